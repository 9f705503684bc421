"""Weight files of a model: finds safetensors files and their tensors by name, and checks these against the model's.

Leaves the format to safetensors_format.py; which program reads which tensor, and into what, is for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from gradwire_protocol.errors import DataError
from gradwire_protocol.relative_paths import check_inside
from gradwire_protocol.safetensors_format import STORED_TYPES, StoredTensor, damaged, read_header, read_json
from gradwire_protocol.v1 import graph_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = "convert once, where you trust the file: safetensors.torch.save_file(torch.load(FILE, weights_only=True), …)"

# Types that hold every value of the first one exactly.
_WIDER: dict[pb.DataType, tuple[pb.DataType, ...]] = {
    pb.DATA_TYPE_FLOAT16: (pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT64),
    pb.DATA_TYPE_BFLOAT16: (pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT64),
    pb.DATA_TYPE_FLOAT32: (pb.DATA_TYPE_FLOAT64,),
    pb.DATA_TYPE_INT8: (pb.DATA_TYPE_INT16, pb.DATA_TYPE_INT32, pb.DATA_TYPE_INT64),
    pb.DATA_TYPE_UINT8: (pb.DATA_TYPE_INT16, pb.DATA_TYPE_INT32, pb.DATA_TYPE_INT64),
    pb.DATA_TYPE_INT16: (pb.DATA_TYPE_INT32, pb.DATA_TYPE_INT64),
    pb.DATA_TYPE_INT32: (pb.DATA_TYPE_INT64,),
    pb.DATA_TYPE_COMPLEX64: (pb.DATA_TYPE_COMPLEX128,),
}


class TensorFiles:
    """The tensors of one or more safetensors files, by name. Keeps no file open and no data in memory."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def find(self, spec: graph_pb2.TensorSpec, prefix: str = "") -> StoredTensor:
        """Return the stored tensor for one of a model's, under the first of its names that is there.

        prefix: stands in front of the model's names, and not in the files. DataError if the tensor is missing, of
        another shape, or of a type whose values the model's cannot all hold.
        """
        names = stored_names(spec, prefix)
        name = next((name for name in names if name in self._tensors), None)
        if name is None:
            raise self._missing(names)
        stored = self._tensors[name]
        if stored.shape != tuple(spec.shape):
            raise DataError(
                f"Tensor '{name}' in {stored.file} does not fit the model",
                expected=f"shape {list(spec.shape)}",
                got=f"shape {list(stored.shape)}",
                remedy="build the model with the configuration that the weights were made with",
            )
        if stored.data_type != spec.data_type and spec.data_type not in _WIDER.get(stored.data_type, ()):
            raise DataError(
                f"Tensor '{name}' in {stored.file} is of a type that would lose precision in the model's",
                expected=_type_name(spec.data_type) + ", or a type whose values it holds exactly",
                got=stored.type_name,
                remedy="build the model in the type of the files (it can be wider), or convert the files",
            )
        return stored

    def _missing(self, names: list[str]) -> DataError:
        near = [
            stored
            for stored in self._tensors
            if any(stored.endswith(f".{name}") or name.endswith(f".{stored}") for name in names)
        ][:3]
        return DataError(
            f"There is no tensor '{names[0]}' in {self.path}",
            expected=" or ".join(f"'{name}'" for name in names[:5]),
            got=f"{len(self)} tensors, among them {', '.join(near or list(self._tensors)[:3])}",
            remedy="names must be the module's own: where the files' lack a prefix of them, give it as prefix=…"
            if near
            else "give the weights of this very model",
        )


def reads_from_files(spec: graph_pb2.TensorSpec, prefix: str) -> bool:
    """Whether a model's tensor is one that weight files hold: a parameter or persistent buffer below the prefix."""
    kept = spec.kind == graph_pb2.TENSOR_KIND_PARAMETER or (
        spec.kind == graph_pb2.TENSOR_KIND_BUFFER and spec.persistent
    )
    return kept and bool(stored_names(spec, prefix))


def stored_names(spec: graph_pb2.TensorSpec, prefix: str) -> list[str]:
    """Return the names that a tensor can have in the files: its own below the prefix, without it."""
    return [name.removeprefix(prefix) for name in spec.names if name.startswith(prefix)]


def open_tensor_files(path: Path, *, root: Path | None = None) -> TensorFiles:
    """Read the headers of a .safetensors file, an index of shards (.safetensors.index.json), or a directory of either.

    root: every file must lie below it, links included. DataError for what is missing, damaged or pickled.
    """
    if path.is_dir():
        indices = sorted(item for item in path.iterdir() if item.name.endswith(INDEX_SUFFIX))
        if len(indices) > 1:
            raise DataError(
                f"{path} has several indices of shards",
                expected="one",
                got=", ".join(item.name for item in indices),
                remedy="name the one that is meant, or leave only that one",
            )
        if indices:
            return _open_index(indices[0], root)
        files = sorted(item for item in path.iterdir() if item.name.endswith(SUFFIX))
        if not files:
            _refuse_without_files(path)
        return _open_shards(path, files, root)
    if not path.exists():
        raise DataError(
            f"There are no weights at {path}", expected=f"a directory, a {SUFFIX} file or an index", got="nothing there"
        )
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path, root)
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickled(path)
    return _open_shards(path, [path], root)


def _open_shards(path: Path, files: list[Path], root: Path | None) -> TensorFiles:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(_placed(file, root)).items():
            if name in tensors:
                raise DataError(
                    f"Tensor '{name}' is in two files of {path}",
                    got=f"{tensors[name].file.name} and {file.name}",
                    remedy="leave one of them, or name the file that is meant",
                )
            tensors[name] = stored
    return TensorFiles(path, tensors)


def _open_index(index: Path, root: Path | None) -> TensorFiles:
    places = read_json(_placed(index, root)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise damaged(index, "a weight_map from names of tensors to names of files", "none")
    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, file in places.items():
        if file not in headers:
            if Path(file).name != file or not file.endswith(SUFFIX) or not file.isprintable():
                raise damaged(index, f"names of {SUFFIX} files beside it", ascii(file[:200]))
            headers[file] = read_header(_placed(index.parent / file, root))
        if name not in headers[file]:
            raise damaged(index, f"tensor {name[:200]!a} in {file}, as the index says", "a file without it")
        tensors[name] = headers[file][name]
    return TensorFiles(index, tensors)


def _placed(file: Path, root: Path | None) -> Path:
    return file if root is None else check_inside(file, root, f"The weights file {file.name}")


def _refuse_without_files(path: Path) -> NoReturn:
    for item in sorted(path.iterdir()):
        if item.suffix in _PICKLE_SUFFIXES:
            raise _pickled(item)
    raise DataError(
        f"There are no weights in {path}",
        expected=f"{SUFFIX} files",
        got="none",
        remedy="name the directory that holds them",
    )


def _pickled(path: Path) -> DataError:
    return DataError(
        f"{path} is a pickle, or may be one: reading it could run any code",
        expected=f"{SUFFIX} files",
        got=path.suffix,
        remedy=_CONVERT,
    )


def _type_name(data_type: pb.DataType) -> str:
    return next((name for name, known in STORED_TYPES.items() if known == data_type), str(pb.DataType.Name(data_type)))
