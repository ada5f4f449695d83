import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)


def load(name: str):
    """A numbered stage as a module: its name is no identifier, so `import` cannot."""
    spec = importlib.util.spec_from_file_location("stage_" + name[:2], ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_stage(stage: str, *args, ok: bool = True) -> subprocess.CompletedProcess:
    """A stage as a user runs it, from the project's folder."""
    command = [sys.executable, f"{stage}.py", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="session")
def tokenizer():
    from common import load_tokenizer

    return load_tokenizer("tiny/lrm")


@pytest.fixture(scope="session")
def model():
    from common import load_model

    return load_model("tiny/lrm")
