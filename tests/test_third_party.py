"""A strategy in a package of its own comes in through the same door as the built-in ones."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qft.registry import BUILT_IN

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "examples" / "third_party"


def install(source: Path, target: Path) -> None:
    """pip, offline; without setuptools to build with, the files that pip would write."""
    if importlib.util.find_spec("setuptools") is not None:
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--no-build-isolation", "--disable-pip-version-check", "--no-cache-dir",
            "--target", str(target), str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copytree(source / "qft_scale", target / "qft_scale")
    information = target / f"qft_scale-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
             for group, points in project["entry-points"].items()]  # fmt: skip
    (information / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder the package is installed into."""
    place = tmp_path_factory.mktemp("third-party")
    source = place / "source"  # building leaves files beside the sources
    shutil.copytree(
        PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    target = place / "installed"
    target.mkdir()
    install(source, target)
    return target


def python(installed: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(installed), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_listing_names_it_without_importing_it(installed):
    code = (
        "import sys\nfrom qft.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "assert 'qft_scale' not in sys.modules\n"
    )
    rows = json.loads(python(installed, "-c", code, "strategies", "--json"))
    names = [row["name"] for row in rows]
    assert names[: len(BUILT_IN)] == list(BUILT_IN)
    assert "output-scale" in names
    assert "output-scale" in python(installed, "-m", "qft.cli", "strategies")


def test_without_the_package_there_is_no_such_strategy():
    from qft.registry import strategy_names

    assert "output-scale" not in strategy_names()


TRIAL = r"""
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from qft.errors import AdapterError, RecipeError
from qft.registry import build_strategy, settings_of, strategy_from_folder
from qft.strategy import Context

folder = Path(sys.argv[1])
facts = {}
strategy = build_strategy({"name": "output-scale", "targets": ["q_proj", "v_proj", "down_proj"]})
facts["home"] = type(strategy).__module__
facts["again"] = build_strategy(settings_of(strategy)) == strategy
facts["mergeable"] = strategy.mergeable


def model(hidden=16, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True)).eval()


def logits(m):
    with torch.no_grad():
        return m(ids).logits


ids = torch.arange(12).view(2, 6)
plain = model()
with torch.no_grad():
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
before = logits(plain)
trained = strategy.attach(plain, Context(total_steps=3))
facts["same at first"] = torch.equal(logits(trained), before)
own = [n for n, p in trained.named_parameters() if p.requires_grad]
facts["trains only its own"] = all(n.endswith("output_delta") for n in own)
facts["count"] = len(own)

optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1.0)
losses = []
for _ in range(3):
    loss = trained(ids, labels=ids).loss
    loss.backward()
    facts["gradient"] = all(p.grad is not None and p.grad.abs().sum() > 0
                            for p in trained.parameters() if p.requires_grad)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
facts["loss falls"] = losses[-1] < losses[0]
facts["base unchanged"] = all(torch.equal(trained.state_dict()[n], t) for n, t in weights.items())
after = logits(trained)
facts["output moved"] = (after - before).abs().max().item()

strategy.save(trained, folder)
facts["files"] = sorted(p.name for p in folder.iterdir())
try:
    strategy_from_folder(folder)
except AdapterError:
    facts["unnamed is refused"] = True
rebuilt = strategy_from_folder(folder, named="output-scale")
facts["rebuilt"] = rebuilt == strategy
fresh = model()
fresh.load_state_dict(weights)
fresh = rebuilt.attach(fresh, Context())
rebuilt.load(fresh, folder)
facts["loaded equal"] = torch.equal(logits(fresh), after)


class Base:
    def names(self):
        return list(weights)

    def shape(self, name):
        return tuple(weights[name].shape)

    def read(self, name):
        return weights[name]


merge = rebuilt.open_merge(folder, Base())
edited = {name: merge.edit(name, tensor) for name, tensor in weights.items()}
facts["edited"] = sum(edited[name] is not weights[name] for name in weights)
facts["shapes"] = all(merge.shape(n) == tuple(t.shape) for n, t in edited.items())
facts["added"] = [len(merge.added()), len(merge.config_changes())]
merged = model()
merged.load_state_dict(edited)
facts["merged differs by"] = (logits(merged) - after).abs().max().item()

wrong = []
other = rebuilt.attach(model(hidden=8), Context())
empty = type("Empty", (Base,), {"names": lambda self: []})()
for trial in (lambda: rebuilt.load(other, folder), lambda: rebuilt.open_merge(folder, empty)):
    try:
        trial()
    except AdapterError as error:
        wrong.append(error.exit_code)
facts["another base"] = wrong
try:
    build_strategy({"name": "output-scale", "targets": ["nothing"]}).attach(model(), Context())
except RecipeError as error:
    facts["no target"] = error.exit_code
with torch.device("meta"):
    skeleton = model()
strategy.needs(skeleton)
facts["on meta"] = sum(p.requires_grad for p in strategy.attach(skeleton, Context()).parameters())
broken = folder / "output_scale.safetensors"
broken.write_bytes(broken.read_bytes()[:-8])
try:
    rebuilt.load(fresh, folder)
except AdapterError as error:
    facts["truncated"] = error.exit_code
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(installed, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("adapter")
    return json.loads(python(installed, "-c", TRIAL, str(folder)).splitlines()[-1])


def test_the_contract_holds(facts):
    moved, differs = facts.pop("output moved"), facts.pop("merged differs by")
    assert moved > 1e-3
    assert differs < 1e-5  # merged and adapter outputs are equal
    assert facts == {
        "home": "qft_scale.output_scale",
        "again": True,
        "mergeable": True,
        "same at first": True,
        "trains only its own": True,
        "count": 6,  # two layers of three targets
        "gradient": True,
        "loss falls": True,
        "base unchanged": True,
        "files": ["output_scale.json", "output_scale.safetensors"],
        "unnamed is refused": True,
        "rebuilt": True,
        "loaded equal": True,
        "edited": 12,  # six weights and their biases
        "shapes": True,
        "added": [0, 0],
        "another base": [2, 2],
        "no target": 2,
        "on meta": 6,
        "truncated": 2,
    }


def test_a_recipe_can_train_and_merge_it(installed, tiny_llama, tmp_path):
    import yaml

    (tmp_path / "train.txt").write_text("one small step, and another small step. " * 40)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({
            "model": str(tiny_llama), "task": "text",
            "data": {"train": str(tmp_path / "train.txt")},
            "strategy": {"name": "output-scale", "targets": ["v_proj", "down_proj"]},
            "dtype": "float32", "device": "cpu", "output": str(tmp_path / "run"),
            "train": {"max_steps": 2, "batch_size": 4, "max_length": 32, "learning_rate": 0.01},
        })
    )  # fmt: skip
    python(installed, "-m", "qft.cli", "train", str(tmp_path / "recipe.yaml"), "--quiet")
    assert (tmp_path / "run" / "adapter" / "output_scale.safetensors").is_file()
    python(
        installed, "-m", "qft.cli", "merge", str(tmp_path / "run"), "--quiet",
        "--out", str(tmp_path / "merged"), "--strategy", "output-scale",
    )  # fmt: skip

    from safetensors.torch import load_file

    deltas = load_file(tmp_path / "run" / "adapter" / "output_scale.safetensors")
    before = load_file(tiny_llama / "model.safetensors")
    after = {}
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        after |= load_file(shard)
    assert set(after) == set(before)
    changed = {name for name in before if not after[name].equal(before[name])}
    assert changed == {f"{name}.weight" for name in deltas}
    name = "model.layers.1.mlp.down_proj"
    expected = before[f"{name}.weight"] * (1 + deltas[name])[:, None]
    assert after[f"{name}.weight"].allclose(expected, rtol=1e-6)
