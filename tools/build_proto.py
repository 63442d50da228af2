"""Regenerates the committed stubs beside each .proto file; ``--check`` only compares them.

The compiler runs from the repository's root, so that generated imports are the package's own
(``serving.proto.jaxinfer.v1``) and nothing has to be rewritten. The output depends on the version
of grpcio-tools alone: the one in the constraints file made what is committed.
"""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = "serving/proto/jaxinfer/v1/inference.proto"


def generate(output: Path) -> list[Path]:
    """Writes the stubs of ``PROTO`` under ``output``; returns their paths relative to it."""
    from grpc_tools import protoc

    status = protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            f"--grpc_python_out={output}",
            str(ROOT / PROTO),
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    return sorted(path.relative_to(output) for path in output.rglob("*_pb2*") if path.is_file())


def stale(output: Path, paths: list[Path]) -> list[Path]:
    """The generated files that differ from the committed ones, or are not committed."""
    return [
        path
        for path in paths
        if not (ROOT / path).exists() or (ROOT / path).read_bytes() != (output / path).read_bytes()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        changed = stale(output, generate(output))
        if check and changed:
            names = ", ".join(map(str, changed))
            raise SystemExit(f"{names}: not what the .proto says; run tools/build_proto.py")
        for path in changed:
            (ROOT / path).write_bytes((output / path).read_bytes())
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
