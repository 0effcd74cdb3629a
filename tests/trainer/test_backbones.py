"""Trunks and heads by name: InsightFace's and timm's networks against oracles written here, their weights, their sizes."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from trainer.backbones import difference, make_trunk, with_sync_batchnorm
from trainer.config import TIMM, ModelConfig, TrainConfig, load
from trainer.iresnet import DEPTHS, ArcFaceHead, Block, IResNet
from trainer.model import Embedder, parameter_groups, size_of


def noise(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def refusal(image_size: int = 112, **settings: object) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        Embedder(ModelConfig(**settings), image_size=image_size)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def randomised(module: nn.Module) -> nn.Module:
    """In double, with no weight or statistic that is 0, 1 or equal to another."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.double().state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.1 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def normed(norm: nn.Module, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch norm in evaluation, channel by channel."""
    own = norm.state_dict()
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        deviation = (own["running_var"][c] + eps).sqrt()
        out[:, c] = (x[:, c] - own["running_mean"][c]) / deviation * own["weight"][c] + own["bias"][c]
    return out


def convolved(weight: Tensor, x: Tensor, stride: int) -> Tensor:
    """Pixel by pixel, the borders being filled with zeros so that stride 1 keeps the size."""
    kernel, side = weight.shape[-1], -(-x.shape[-1] // stride)
    padded = nn.functional.pad(x, [kernel // 2] * 4)
    out = torch.zeros(len(x), len(weight), side, side, dtype=x.dtype)
    for row, column in itertools.product(range(side), repeat=2):
        seen = padded[:, :, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
        out[:, :, row, column] = (seen[:, None] * weight[None]).sum((2, 3, 4))
    return out


def prelu(slope: Tensor, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope[:, None, None] * x)


@pytest.mark.parametrize(("before", "width", "stride"), [(3, 3, 1), (2, 3, 2)])
def test_a_block_is_norm_convolution_norm_prelu_convolution_norm(before, width, stride):
    block = randomised(Block(before, width, stride)).eval()
    x = torch.randn(2, before, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inner = normed(block.bn2, convolved(block.conv1.weight.detach(), normed(block.bn1, x), 1))
    inner = normed(block.bn3, convolved(block.conv2.weight.detach(), prelu(block.prelu.weight.detach(), inner), stride))
    beside = x if stride == 1 else normed(block.downsample[1], convolved(block.downsample[0].weight.detach(), x, 2))
    torch.testing.assert_close(block(x).detach(), inner + beside, rtol=0, atol=1e-10)


def test_the_network_is_a_stem_and_four_stages_that_halve():
    """Nine pixels become 5, 3, 2, 1; `pooled` takes the means."""
    network = randomised(IResNet((1, 2, 1, 1), pooled=False)).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data /= 100
    pixels = torch.randn(1, 3, 18, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        x = prelu(network.prelu.weight, normed(network.bn1, convolved(network.conv1.weight, pixels, 1)))
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            for block in stage:
                x = block(x)
        assert x.shape == (1, 512, 2, 2)
        torch.testing.assert_close(network(pixels), x, rtol=1e-10, atol=0)
        network._pooled = True
        torch.testing.assert_close(network(pixels), x.sum((2, 3)) / 4, rtol=1e-10, atol=0)


def insightface_names(depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in backbone.pth at 512 dimensions, as its published code orders them."""

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        sizes = {f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
        return sizes | {f"{name}.num_batches_tracked": ()}

    found = {"conv1.weight": (64, 3, 3, 3)} | norm("bn1", 64) | {"prelu.weight": (64,)}
    before = 64
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True), start=1):
        for number in range(depth):
            block = f"layer{stage}.{number}"
            found |= norm(f"{block}.bn1", before) | {f"{block}.conv1.weight": (width, before, 3, 3)}
            found |= norm(f"{block}.bn2", width) | {f"{block}.prelu.weight": (width,)}
            found |= {f"{block}.conv2.weight": (width, width, 3, 3)} | norm(f"{block}.bn3", width)
            if number == 0:
                found |= {f"{block}.downsample.0.weight": (width, before, 1, 1)} | norm(f"{block}.downsample.1", width)
            before = width
    found |= norm("bn2", 512) | {"fc.weight": (512, 512 * 7 * 7), "fc.bias": (512,)}
    return found | norm("features", 512)


@pytest.mark.parametrize(("trunk", "millions"), [("iresnet18", 24.02), ("iresnet50", 43.59), ("iresnet100", 65.15)])
def test_iresnets_have_insightfaces_names_and_published_sizes(trunk, millions):
    with torch.device("meta"):
        model = Embedder(ModelConfig(trunk=trunk, embedding_size=512))
    own = {**model.trunk.state_dict(), **model.head.state_dict()}
    wanted = insightface_names(DEPTHS[trunk])
    assert {name: tuple(value.shape) for name, value in own.items()} == wanted
    assert list(own) == list(wanted)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.head_norm.state_dict() == {}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A file like InsightFace's, of its smallest network, whose weights are no other's."""
    generator = torch.Generator().manual_seed(4)
    shapes = insightface_names(DEPTHS["iresnet18"])
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    state |= {name: torch.tensor(7) for name in shapes if name.endswith("tracked")}
    path = tmp_path_factory.mktemp("insightface") / "backbone.pth"
    torch.save(state, path)
    return path, state


def test_insightfaces_file_is_the_trunk_and_the_head(backbone):
    path, state = backbone
    model = Embedder(ModelConfig(trunk="iresnet18", embedding_size=512, weights=path))
    own = {**model.trunk.state_dict(), **model.head.state_dict()}
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)
    pooled = Embedder(ModelConfig(trunk="iresnet18", head="linear", weights=path)).trunk.state_dict()
    behind = ("bn2.", "fc.", "features.")
    assert pooled.keys() == {name for name in state if not name.startswith(behind)}
    assert all(torch.equal(pooled[name], state[name]) for name in pooled)


def test_insightfaces_file_of_other_sizes_is_refused(backbone):
    path, _ = backbone
    said = f"model.weights {path} is not a state dict of "
    assert refusal(trunk="iresnet18", weights=path) == (
        f"{said}iresnet18: it has fc.weight of shape (512, 25088), the network (128, 25088) (6 such)"
    )
    assert refusal(64, trunk="iresnet18", embedding_size=512, weights=path) == (
        f"{said}iresnet18: it has fc.weight of shape (512, 25088), the network (512, 8192) (1 such)"
    )
    lacks = refusal(trunk="iresnet50", embedding_size=512, weights=path)
    assert lacks.startswith(f"{said}iresnet50: it lacks layer1.2.bn1.weight (")
    assert refusal(trunk="resnet18", weights=path).startswith(
        f"{said}resnet18: it has prelu.weight, which the network has not ("
    )


def test_counts_of_batches_may_be_missing_and_nothing_else(tmp_path):
    """torchvision's older files, those of its ImageNet weights, have none."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path / "old.pth"
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    own = Embedder(ModelConfig(trunk="resnet18", weights=path)).trunk.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    empty = torch.zeros(2)
    assert difference({"a.running_mean": empty}, {}) == "lacks a.running_mean (1 such)"
    assert difference({"a": empty}, {"a": empty, "b": empty, "c": empty}) == "has b, which the network has not (2 such)"


def test_the_head_of_arcface_by_hand():
    head = randomised(ArcFaceHead(2, 3, 4, dropout=0.5)).eval()
    maps = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inner = normed(head.bn2, maps)
    weight, bias = head.fc.weight.detach().view(4, 2, 3, 3), head.fc.bias.detach()
    linear = torch.stack([(inner * weight[d]).sum((1, 2, 3)) + bias[d] for d in range(4)], 1)
    torch.testing.assert_close(head(maps).detach(), normed(head.features, linear), rtol=0, atol=1e-10)
    assert not head.features.weight.requires_grad
    head.train()
    assert not torch.allclose(head(maps), head(maps)), "dropout draws anew"


def test_the_heads_of_facenet_by_hand():
    """512-d: features @ weight, then (x - mean) / sqrt(variance + 0.001) * scale + shift; 128-d: features @ weight + bias."""
    features = torch.randn(3, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for settings in ({"head": "facenet", "embedding_size": 512}, {"head_batchnorm": False}):
        model = randomised(Embedder(ModelConfig(trunk="resnet18", **settings))).eval()
        model.trunk = Given(features)
        out = features @ model.head.weight.detach().T
        if "head" in settings:
            assert model.head.bias is None
            out = normed(model.head_norm, out, eps=1e-3)
        else:
            assert model.head.weight.shape == (128, 512)
            out = out + model.head.bias.detach()
        wanted = out / out.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(model(noise(3, 16)).detach(), wanted, rtol=0, atol=1e-12)


class Given(nn.Module):
    """Stands in for a trunk."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features


@pytest.mark.parametrize(
    ("settings", "share"), [({"head": "facenet"}, 0.6), ({"head": "facenet", "dropout": 0.25}, 0.25), ({}, 0.0)]
)
def test_dropout_is_that_of_the_head(settings, share):
    """Of 512 x 64 inputs that are 1 a share is 0 and the others are 1 / (1 - share); in evaluation none is."""
    model = Embedder(ModelConfig(trunk="resnet18", **settings))
    model.trunk, seen = Given(torch.ones(64, 512)), []
    model.head.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    model(noise(64, 16))
    assert float((seen[0] == 0).double().mean()) == pytest.approx(share, abs=0.02)
    assert float(seen[0].max()) == pytest.approx(1 / (1 - share))
    model.eval()(noise(64, 16))
    assert seen[1].eq(1).all()


def test_torchvisions_trunks_start_as_they_always_did():
    """torchvision's network drawn first, then the linear head, and no other random number."""
    torch.manual_seed(5)
    trunk, head = torchvision.models.resnet50(weights=None), nn.Linear(2048, 128)
    after = torch.rand(2)
    torch.manual_seed(5)
    model = Embedder(ModelConfig())
    assert torch.equal(torch.rand(2), after)
    wanted = {f"trunk.{name}": value for name, value in trunk.state_dict().items() if not name.startswith("fc.")}
    wanted |= {"head.weight": head.weight, "head.bias": head.bias}
    own = model.state_dict()
    assert own.keys() == wanted.keys() | {f"head_norm.running_{name}" for name in ("mean", "var")} | {
        "head_norm.num_batches_tracked"
    }
    assert all(torch.equal(own[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(("trunk", "side"), [("resnet18", 2), ("iresnet18", 4), ("timm:test_resnet", 2)])
def test_arcfaces_head_behind_any_convolutional_trunk(trunk, side):
    """50 pixels: 25, 13, 7, 4 and, with a fifth halving, 2. The maps of a trunk are what it pools without this head."""
    torch.manual_seed(0)
    model = Embedder(ModelConfig(trunk=trunk, head="arcface", embedding_size=8), image_size=50).eval()
    torch.manual_seed(0)
    pooled = make_trunk(trunk, 50, maps=False).network.eval()
    with torch.inference_mode():
        points = model(noise(2, 50))
        pixels = torch.randn(2, 3, 50, 50, generator=torch.Generator().manual_seed(3))
        maps = model.trunk(pixels)
        assert maps.shape[2:] == (side, side)
        torch.testing.assert_close(maps.mean((2, 3)), pooled(pixels), rtol=1e-4, atol=1e-5)
    assert points.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_timms_networks_start_as_timm_starts_them_and_are_fed_as_timm_says():
    """test_vit: mean and standard deviation 0.5, and a fixed picture size; in float64 (0, 128, 255) is (-1, 1 / 255, 1)."""
    torch.manual_seed(6)
    theirs = timm.create_model("test_vit", num_classes=0, img_size=48).state_dict()
    torch.manual_seed(6)
    model = Embedder(ModelConfig(trunk="timm:test_vit"), image_size=48)
    own = model.trunk.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    seen = []
    model.trunk.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.double().eval()(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 48, 48))
    assert seen[0][0, :, 5, 7].tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-7)


def test_timms_weights_come_without_their_classifier_and_for_another_size(tmp_path):
    torch.manual_seed(8)
    theirs = timm.create_model("test_vit", num_classes=10).state_dict()  # 160 px
    path = tmp_path / "vit.pth"
    torch.save(theirs, path)
    same = Embedder(ModelConfig(trunk="timm:test_vit", weights=path), image_size=160).trunk.state_dict()
    assert same.keys() == {name for name in theirs if not name.startswith("head.")}
    assert all(torch.equal(same[name], theirs[name]) for name in same)
    smaller = Embedder(ModelConfig(trunk="timm:test_vit", weights=path), image_size=80).trunk.state_dict()
    changed = {name for name in smaller if not torch.equal(smaller[name], theirs[name])}
    assert changed == {"pos_embed"}
    tokens = theirs["pos_embed"].shape[1] - 10 * 10
    assert torch.equal(smaller["pos_embed"][:, :tokens], theirs["pos_embed"][:, :tokens])
    mean_then, mean_now = (state["pos_embed"][:, tokens:].mean(1) for state in (theirs, smaller))
    torch.testing.assert_close(mean_now, mean_then, rtol=0, atol=0.01)
    said = refusal(trunk="timm:test_resnet", weights=path)
    assert said.startswith(f"model.weights {path} is not a state dict of timm:test_resnet: it lacks conv1.")


@pytest.mark.parametrize(
    ("trunk", "head", "size", "said"),
    [
        ("timm:convnext_tinyy", "auto", 112, "model.trunk is 'timm:convnext_tinyy'; timm {} has no such model, but convnext_t"),
        ("timm:hf-hub:timm/resnet18", "auto", 112, "model.trunk is 'timm:hf-hub:timm/resnet18'; timm {} has no such model"),
        ("timm:test_vit.no_tag", "auto", 112, "model.trunk is 'timm:test_vit.no_tag'; timm says: Invalid pretrained tag"),
        ("timm:inception_v4", "auto", 32, "data.image_size is 32; model.trunk timm:inception_v4 cannot take it: Calculated"),
        ("timm:twins_svt_small", "auto", 112, "data.image_size is 112; model.trunk timm:twins_svt_small, whose own size is 224"),
        ("timm:test_vit", "arcface", 112, "model.trunk timm:test_vit has no square maps for model.head arcface; take linear or"),
    ],
)  # fmt: skip
def test_what_timm_does_not_have_or_take_is_one_line(trunk, head, size, said):
    assert refusal(size, trunk=trunk, head=head).startswith(said.format(timm.__version__))


def test_names_and_heads_that_do_not_go_together_are_refused():
    assert refusal(trunk="resnet5").startswith("model.trunk is 'resnet5'; did you mean resnet50")
    assert refusal(trunk="vgg").startswith("model.trunk is 'vgg'; allowed are resnet18, ")
    assert refusal(trunk=TIMM).endswith("and timm:NAME for any model of timm")
    assert refusal(dropout=1.0) == "model.dropout is 1.0; allowed is [0, 1), or None"
    assert refusal(trunk="iresnet18", head_batchnorm=False).startswith(
        "model.head_batchnorm is False; head arcface has"
    )


def test_earlier_configs_mean_what_they_did(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {trunk: resnet34, embedding_size: 64, head_batchnorm: false}")
    found = load(tmp_path / "config.yaml").model
    assert (found.head_kind, found.effective_dropout, found.head_batchnorm) == ("linear", 0.0, False)
    assert TrainConfig().model.head_kind == "linear"
    assert ModelConfig(trunk="iresnet50").head_kind == "arcface"


def iresnet_multiply_adds(depths: tuple[int, ...], side: int, embedding_size: int) -> int:
    """Counted layer by layer."""
    found, before = 9 * 3 * 64 * side**2, 64
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        for block in range(depth):
            found += 9 * before * width * side**2
            side = side if block else -(-side // 2)
            found += 9 * width * width * side**2 + (0 if block else before * width * side**2)
            before = width
    return found + 512 * side**2 * embedding_size


def test_sizes_are_those_that_are_published():
    """InsightFace's model zoo: 6.33 and 12.12 x 10^9; torchvision: 1.81 x 10^9 at 224 px with 1,000 classes."""
    for trunk, published in (("iresnet50", 6.33e9), ("iresnet100", 12.12e9)):
        with torch.device("meta"):
            found = size_of(Embedder(ModelConfig(trunk=trunk, embedding_size=512)))
        assert found.multiply_adds == iresnet_multiply_adds(DEPTHS[trunk], 112, 512)
        assert found.multiply_adds == pytest.approx(published, rel=0.01)
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=1000, head_batchnorm=False), image_size=224)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = size_of(model)
    assert found.parameters == 11_689_512
    assert found.multiply_adds == pytest.approx(1.814e9, rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it was not run"
    assert model.training


def test_decay_leaves_out_what_timm_excepts_and_what_is_not_trained():
    model = Embedder(ModelConfig(trunk="timm:test_vit"), image_size=48)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | others == set(names.values())
    assert {"trunk.pos_embed", "trunk.cls_token"} <= others
    assert {"trunk.patch_embed.proj.weight", "head.weight"} <= decayed
    frozen = Embedder(ModelConfig(trunk="resnet18", head="arcface"), image_size=32)
    groups = parameter_groups(frozen, 0.1)
    assert all(p is not frozen.head.features.weight for group in groups for p in group["params"])


def test_batch_norms_over_all_ranks_keep_timms_activations():
    """torch's own conversion would drop them."""
    model = Embedder(ModelConfig(trunk="timm:test_efficientnet"), image_size=32).eval()
    before = model(noise(2, 32))
    converted = with_sync_batchnorm(model, "timm:test_efficientnet")
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(converted(noise(2, 32)), before)
