"""A head with its loss as one function, in DDP and FSDP2. All ranks have one batch."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packlight
from packlight.head import LazyLogits
from tests.integrations.models import batch, make, step, worst_error
from tests.parallel.ranks import join, leave

if __name__ == "__main__":
    _, _, kind = join()
    inputs = {name: tensor.to(kind) for name, tensor in batch("llama").items()}
    plain = make("llama").to(kind)
    expected, true = step(plain, inputs)

    def converted():
        model = make("llama").to(kind)
        packlight.convert(model, {}, head=True)
        return model

    def check(output, found):
        torch.testing.assert_close(output.loss, expected.loss)
        assert worst_error(found, true) < 1e-5

    def squared(model):
        """Gradients of logits that no loss of the head's own reads."""
        model.zero_grad()
        model(input_ids=inputs["input_ids"]).logits.square().mean().backward()
        return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}

    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model = DistributedDataParallel(converted(), **options)
        for _ in range(2):
            output, found = step(model, inputs)
            assert type(output.logits) is LazyLogits
            check(output, {name.removeprefix("module."): one for name, one in found.items()})
        # Logits that went through the wrapper's own Function still have their gradient.
        assert worst_error(squared(model), squared(plain)) < 1e-5

    for alone in (False, True):
        model = converted()
        for layer in model.model.layers:
            fully_shard(layer)
        if alone:
            fully_shard(model.lm_head)
        fully_shard(model)
        for _ in range(2):
            output, found = step(model, inputs)
            check(output, {name: one.full_tensor() for name, one in found.items()})
        assert (type(output.logits) is LazyLogits) != alone  # a head alone has no weight left
    leave("same gradients")
