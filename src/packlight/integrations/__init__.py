"""What other packages need of packlight: rules for their layers, callbacks for their trainers."""
