"""The callbacks for `lightning` and `pytorch_lightning`."""

import importlib

import pytest
import torch
from torch import nn

import packlight
from packlight import FewBit, GroupQuant, _seeds

EIGHT = (GroupQuant(bits=8, group_size=32, rounding="nearest"), FewBit(bits=8))

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Advice, where there are more cores.
        "The 'train_dataloader' does not have many workers",
        # The module validates in one test only.
        "You defined a `validation_step` but have no `val_dataloader`",
        # Of lightning's own code.
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    )
]


@pytest.fixture(params=["lightning", "pytorch_lightning"])
def framework(request):
    return importlib.import_module(request.param)


@pytest.fixture
def callback_class(framework):
    return importlib.import_module(f"packlight.integrations.{framework.__name__}").PacklightCallback


def make_module(framework, automatic=True):
    class Module(framework.LightningModule):
        def __init__(self):
            super().__init__()
            packlight.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(64, 256),
                nn.GELU(),
                nn.Linear(256, 64),
                nn.LayerNorm(64),
                nn.Linear(64, 1),
            )
            self.automatic_optimization = automatic
            self.losses = []
            self.fails = False

        def training_step(self, batch, index):
            if self.fails:
                raise RuntimeError("no step today")
            loss = self.net(batch).square().mean()
            self.losses.append(loss.item())
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Module()


def trainer_of(framework, folder, *callbacks, **options):
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": str(folder),
    }  # fmt: skip
    return framework.Trainer(callbacks=list(callbacks), **{**settings, **options})


def loader():
    generator = torch.Generator().manual_seed(5)
    return torch.utils.data.DataLoader(torch.randn(128, 64, generator=generator), batch_size=32)


def kinds(module):
    return [type(child) for child in module.net]


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_it_converts_measures_and_logs(framework, callback_class, automatic, tmp_path):
    module, plain = make_module(framework, automatic), make_module(framework, automatic)
    callback = callback_class(EIGHT)
    assert isinstance(callback, framework.Callback)
    trainer = trainer_of(framework, tmp_path, callback)
    trainer.fit(module, loader())
    trainer_of(framework, tmp_path).fit(plain, loader())
    assert kinds(module)[:2] == [packlight.groupquant.Linear, packlight.groupquant.GELU]
    assert module.losses == pytest.approx(plain.losses, rel=5e-3)
    batch = next(iter(loader()))
    measured = packlight.profile(module.net, batch, loss=lambda y: y.square().mean())
    assert callback.kept_bytes == measured.activation_bytes + measured.input_bytes
    assert trainer.logged_metrics["packlight_kept_bytes"] == callback.kept_bytes
    assert len(callback.conversion.replaced) == 5


def test_it_reverts_on_request(framework, callback_class, tmp_path):
    module = make_module(framework)
    callback = callback_class(EIGHT, revert_at_end=True)
    trainer_of(framework, tmp_path, callback).fit(module, loader())
    assert kinds(module) == kinds(make_module(framework))


def test_without_a_measurement(framework, callback_class, tmp_path):
    callback = callback_class(EIGHT, measure=False)
    trainer = trainer_of(framework, tmp_path, callback)
    trainer.fit(make_module(framework), loader())
    assert callback.kept_bytes is None
    assert "packlight_kept_bytes" not in trainer.logged_metrics


def test_a_failing_step_leaves_no_hooks_behind(framework, callback_class, tmp_path):
    module = make_module(framework)
    module.fails = True
    with pytest.raises(RuntimeError, match="no step today"):
        trainer_of(framework, tmp_path, callback_class(EIGHT)).fit(module, loader())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_checkpoints_are_plain_ones(framework, callback_class, tmp_path):
    module = make_module(framework)
    trainer = trainer_of(framework, tmp_path, callback_class(EIGHT))
    trainer.fit(module, loader())
    _seeds.set_rounding_state({"base": 7, "next": 5})
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    state = torch.load(tmp_path / "saved.ckpt", weights_only=False)["state_dict"]
    plain = make_module(framework)
    plain.load_state_dict(state)
    for name, parameter in module.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter)
    resumed = make_module(framework)
    again = trainer_of(framework, tmp_path, callback_class(EIGHT), max_epochs=2)
    again.fit(resumed, loader(), ckpt_path=str(tmp_path / "saved.ckpt"), weights_only=False)
    assert again.global_step == 8
    assert _seeds.rounding_state() == {"base": 7, "next": 5}  # these packs round to nearest


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_is_an_uninterrupted_one_bit_for_bit(framework, callback_class, tmp_path):
    package = "lightning.pytorch" if framework.__name__ == "lightning" else "pytorch_lightning"
    checkpoints = importlib.import_module(f"{package}.callbacks").ModelCheckpoint

    def fitted(checkpoint=None):
        module = make_module(framework)
        # Without a rule, so that `rest` packs; dropout has no place: Lightning saves no generator.
        module.net.insert(2, nn.Hardshrink())
        options = {"max_epochs": 2, "enable_checkpointing": True}
        callbacks = callback_class(), checkpoints(tmp_path, every_n_train_steps=4, save_top_k=-1)
        trainer = trainer_of(framework, tmp_path, *callbacks, **options)
        trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=False)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    whole = fitted()
    (first,) = tmp_path.glob("*step=4.ckpt")
    assert torch.equal(fitted(str(first)), whole)


def test_validation_alone_converts_nothing(framework, callback_class, tmp_path):
    module = make_module(framework)
    callback = callback_class(EIGHT)
    trainer_of(framework, tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.conversion is None
