"""The examples in the docstrings of the public classes run, and `import mahalo_ray` stays light."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf
from tiny_reward_models import CONFIG, TOKENIZER, base

import mahalo_ray

PUBLIC = [name for name in mahalo_ray.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def folder(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `model/`, a tiny causal LM, and `classifier/`, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("examples")
    base().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    config = tf.Qwen2Config(**CONFIG, num_labels=1, pad_token_id=0)
    tf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "classifier")
    TOKENIZER.save_pretrained(folder / "classifier")
    return folder


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    documented = getattr(mahalo_ray, name)
    test = doctest.DocTestParser().get_doctest(
        documented.__doc__ or "",
        {**vars(sys.modules[documented.__module__]), "tokenizer": TOKENIZER},
        name,
        None,
        0,
    )
    assert test.examples, f"{name} has no example in its docstring"
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append)
    assert result.failed == 0, "".join(output)


def test_type_checkers_and_python_see_the_same_names() -> None:
    tree = ast.parse(Path(mahalo_ray.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == mahalo_ray._MODULES
    assert set(PUBLIC) <= set(dir(mahalo_ray))
    with pytest.raises(AttributeError, match="no attribute 'GuidedDecodre'"):
        _ = mahalo_ray.GuidedDecodre


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, mahalo_ray; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
