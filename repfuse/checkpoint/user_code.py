"""Code that the user named: what the names cover, where Python finds it, and running it once per process.

A name is looked for on the import path, then where the user stands, then beside the checkpoint; a path is what it says.
Nothing is looked for in these folders, and nothing runs, that was not named.

Of a script only the classes are taken, without its work: what a file that was saved from ``__main__`` needs. One that
stands under ``if __name__ == "__main__":`` is run but for that, as an import would. Of any other one only the
definitions run that a class refers to, and what these refer to: not the training that saved the file.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import os
import symtable
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from repfuse.errors import RepfuseError
from repfuse.wording import described

MAIN = "__main__"
WORK = frozenset({"save", "backward", "step", "fit"})  # methods that only a script calls outside of functions

PIP = {  # libraries of networks, by what is imported: what pip calls them
    **{name: name for name in ("timm", "torchvision", "ultralytics", "transformers", "mmengine", "mmcv", "mmdet")},
    **{name: name for name in ("mmpretrain", "mmsegmentation", "mmpose", "kornia", "monai", "lightning", "einops")},
    **{name: name for name in ("fastai", "torchaudio", "effdet", "pretrainedmodels", "diffusers", "peft", "thop")},
    "mmseg": "mmsegmentation",
    "pytorch_lightning": "pytorch-lightning",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "efficientnet_pytorch": "efficientnet-pytorch",
    "facenet_pytorch": "facenet-pytorch",
    "open_clip": "open_clip_torch",
    "torch_geometric": "torch-geometric",
    "sentence_transformers": "sentence-transformers",
}
folders: list[str] = []
"""Where code was found that the user named; they stand at the end of the import path."""
_files: dict[Path, tuple[bytes, ModuleType]] = {}


@dataclass(frozen=True)
class Named:
    """The ``names`` of packages, modules and classes, and the ``paths`` of files and folders, whose code may run.

    ``file`` is the checkpoint that may name them; what the user named is looked for beside it, too.
    """

    names: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()
    file: Path | None = None

    @property
    def places(self) -> list[Path]:
        """Where the user stands, and the folder of the checkpoint."""
        return list(dict.fromkeys([Path.cwd(), *([self.file.resolve().parent] if self.file else [])]))

    def covers(self, module: str, name: str = "") -> bool:
        """Whether the user named the module, what it lies in, or its class ``name``."""
        dotted = f"{module}.{name}"
        return any(f"{dotted}.".startswith(f"{each}.") for each in self.names) or self._root(module) is not None

    def finds(self, module: str) -> bool:
        """Whether Python would find the module, here or where it was named; nothing runs."""
        return self._root(module) is not None or is_found(module, *self.places)

    def load(self, module: str) -> ModuleType:
        """Return the module, which ``covers`` says was named. It raises whatever its code raises."""
        root = self._root(module)
        if root is None and not is_found(module):
            root = next((place for place in self.places if is_found_in(module, place)), None)
        with running(root):
            return importlib.import_module(module)

    def of_script(self, name: str) -> Any:
        """Return what a script that was named calls ``name``; None where none of them does."""
        for path in self.paths:
            if path.is_file() and name in script(path).names:
                with running(path.parent, path):
                    return script(path).get(name)
        return getattr(sys.modules[MAIN], name, None) if MAIN in self.names else None

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let a file that is trusted import what was named, by itself."""
        with ExitStack() as stack:
            for place in (*(reversed(self.places) if self.names else ()), *(path.parent for path in self.paths)):
                stack.enter_context(running(place))
            for path in self.paths:
                if path.is_file():
                    script(path)
            stack.enter_context(playing_main())
            yield

    def _root(self, module: str) -> Path | None:
        """Return the folder from which a path that was named gives ``module``."""
        parts = tuple(module.split("."))
        for path in self.paths:
            own, least = (path.parts, 1) if path.is_dir() else (path.with_suffix("").parts, len(parts))
            for count in range(least, len(parts) + 1):
                if own[-count:] == parts[:count]:
                    return Path(*own[:-count])
        return None


def named(said: Collection[str], file: Path | None = None) -> Named:
    """Return what ``--allow`` says. Raises RepfuseError where a path leads nowhere, or to no Python."""
    paths = tuple(_path(Path(each)) for each in said if _is_path(each))
    return Named(tuple(each for each in said if not _is_path(each)), paths, file)


def _is_path(text: str) -> bool:
    return text.endswith((".py", ".ipynb")) or any(separator in text for separator in ("/", os.sep))


def _path(path: Path) -> Path:
    if path.suffix == ".ipynb":
        hint = f"Make it one: jupyter nbconvert --to script {path}. Then --allow {path.with_suffix('.py')}."
        raise RepfuseError(f"{path} is a notebook, and not a Python file.", "", hint)
    if not path.is_file() and not path.is_dir():
        what = "is no regular file" if path.exists() else "does not exist"
        raise RepfuseError(f"{path} {what}.", f"You are in {Path.cwd()}.", "Give the path of a Python file.")
    try:
        if path.is_file():
            script(path.resolve())
    except (SyntaxError, ValueError) as error:
        raise RepfuseError(f"{path} is no Python file.", _where(error, path), "Give the path of one.") from error
    return path.resolve()


def is_found(module: str, *places: Path) -> bool:
    """Whether Python would find the module, as it is or in one of these folders; nothing runs."""
    return module in sys.modules or any(is_found_in(module, place) for place in (None, *places))


def is_found_in(module: str, place: Path | None) -> bool:
    """Whether the module is in the folder ``place``, or else on the import path; nothing runs."""
    top, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(top, [str(place)]) if place else importlib.util.find_spec(top)
        for count, _ in enumerate(rest, start=2):
            if spec is None or spec.submodule_search_locations is None:
                return False
            spec = PathFinder.find_spec(".".join([top, *rest][:count]), list(spec.submodule_search_locations))
    except (ImportError, ValueError):  # no name that a module can have
        return False
    return spec is not None and bool(spec.origin)  # a folder without __init__.py holds modules and is none


@contextmanager
def running(root: Path | None, path: Path | None = None) -> Iterator[None]:
    """Let code import as Python does that was started in ``root``, and see itself called without arguments.

    Afterwards ``root`` stays at the end of the import path, for what is imported late, and hides nothing.
    """
    before = sys.argv
    if root is not None:
        sys.path.insert(0, str(root))
    sys.argv = [str(path or root or "")]
    try:
        yield
    finally:
        sys.argv = before
        if root is not None:
            with suppress(ValueError):
                sys.path.remove(str(root))
            if str(root) not in sys.path:
                sys.path.append(str(root))
                folders.append(str(root))


@contextmanager
def installed_only() -> Iterator[None]:
    """Find nothing where code was found that the user named: for what a file names without being asked."""
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if entry not in folders]
    try:
        yield
    finally:
        sys.path[:] = before


def load_file(path: Path) -> ModuleType:
    """Return the module of the Python file at ``path``, run once; again where the file has changed since.

    It gets the name that Python would import it by, so that its neighbours, its package and its folder are found.
    Raises RepfuseError where it does not run.
    """
    path, text = path.resolve(), path.read_bytes()
    if path in _files and _files[path][0] == text:
        return _files[path][1]
    known = next((held for held in list(sys.modules.values()) if getattr(held, "__file__", None) == str(path)), None)
    if known is not None and path not in _files:
        return known
    root, name = _name_of(path)
    if known is not None:
        del sys.modules[known.__name__]
    with running(path.parent), running(root, path), explained(path):
        module = _import(name, path)
    _files[path] = text, module
    return module


def _import(name: str, path: Path) -> ModuleType:
    importlib.invalidate_caches()
    spec = None if name in sys.modules else importlib.util.find_spec(name)  # which runs the packages that it lies in
    if spec is None or spec.origin != str(path):  # Python would find another file, or none
        spec = importlib.util.spec_from_file_location(f"repfuse_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def _name_of(path: Path) -> tuple[Path, str]:
    """Return the folder in which Python would be started to import ``path``, and the name that it would have."""
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    if root == path.parent and path.is_relative_to(Path.cwd()):
        root = Path.cwd()
    parts = path.relative_to(root).with_suffix("").parts
    return (root, ".".join(parts)) if all(map(str.isidentifier, parts)) else (path.parent, path.stem)


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Make one clear message of whatever the user's code raises while it is run."""
    try:
        yield
    except RepfuseError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        what, why, hint = f"{path} does not run.", _where(error, path), "Mend it first."
        if isinstance(error, SystemExit):
            what, why = f"{path} ends the program when it is imported{_line(error, path)}.", ""
            hint = 'Put what it does when it is started under `if __name__ == "__main__":`.'
        elif isinstance(error, ModuleNotFoundError) and error.name:
            what, why = f"{path} imports {error.name}, which Python does not find.", ""
            hint = missing(error, path)
        raise RepfuseError(what, why, hint) from error


def missing(error: BaseException, path: Path | str = "") -> str:
    """Return what to do about a module that the user's code did not find; empty where that is not the trouble."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    top = error.name.partition(".")[0]
    if top in PIP:
        return f"Install it: pip install {PIP[top]}."
    parents = Path(path).resolve().parents if str(path) else ()
    root = next((folder for folder in parents if is_found_in(error.name, folder)), None)
    if root is not None:
        return f"It is in {root}: run repfuse from there."
    return f"Install it (pip install {top}), or run repfuse from the folder in which Python finds it."


def _where(error: BaseException, path: Path | str) -> str:
    """Return the error, and the line of the user's file that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    return described(error) + _line(error, path)


def _line(error: BaseException, path: Path | str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" (line {lines[-1]})" if lines else ""


# The classes of scripts.


class Script:
    """The file at ``path``. Raises SyntaxError where it is no Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_bytes()
        body = ast.parse(self.text, str(path)).body
        self._body = [statement for statement in body if not _asks_for_its_name(statement)]
        self._guarded = len(self._body) < len(body)
        self._parts = [_Part(statement) for statement in self._body]
        self.done: set[int] = set()
        self._space: dict[str, Any] = {"__name__": MAIN, "__file__": str(path), "__builtins__": builtins}

    @property
    def names(self) -> set[str]:
        """The names that the script gives a meaning."""
        return set[str]().union(*(part.binds for part in self._parts))

    @property
    def works(self) -> bool:
        """Whether the script trains or saves as soon as it is imported."""
        return not self._guarded and any(part.methods & WORK for part in self._parts)

    def get(self, name: str) -> Any:
        """Return what ``name`` is, having run what that takes, each statement once. It may raise anything."""
        left = [i for i in self._needed(name) if i not in self.done]
        self.done.update(left)
        future = [each for each in self._body if isinstance(each, ast.ImportFrom) and each.module == "__future__"]
        chosen = [*future, *(self._body[i] for i in left if self._body[i] not in future)]
        exec(compile(ast.Module(chosen, []), str(self.path), "exec", dont_inherit=True), self._space)
        return self._space[name]

    def _needed(self, name: str) -> list[int]:
        if self._guarded:
            return list(range(len(self._body)))
        imports = set[str]().union(*(part.binds for part in self._parts if part.is_import))
        wanted, chosen = {name}, {i for i, part in enumerate(self._parts) if part.changes_path or "*" in part.binds}
        before = -1
        while len(chosen) != before:
            before = len(chosen)
            for i, part in enumerate(self._parts):
                if (part.binds | (part.changes - imports)) & wanted:
                    chosen.add(i)
                    wanted |= part.uses
        return sorted(chosen)


class _Part:
    """One statement of a script: the names that it ``binds``, ``uses`` and ``changes`` what they stand for."""

    def __init__(self, statement: ast.stmt) -> None:
        self.is_import = isinstance(statement, (ast.Import, ast.ImportFrom))
        table = symtable.symtable(ast.unparse(statement), "", "exec")
        own = table.get_symbols()
        self.binds = {symbol.get_name() for symbol in own if symbol.is_assigned() or symbol.is_imported()}
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            self.binds.add("*")
        self.uses = {symbol.get_name() for symbol in own if symbol.is_referenced()} | _globals_of(table)
        places = list(_places(statement))
        self.changes = {ast.unparse(place).partition(".")[0].partition("[")[0] for place in places}
        self.methods = {place.attr for place in places if isinstance(place, ast.Attribute)}
        self.changes_path = any(ast.unparse(place).startswith("sys.path") for place in places)


def _asks_for_its_name(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    """Return the global names that functions and classes within ``table`` use, at any depth."""
    found: set[str] = set()
    for inner in table.get_children():
        found |= {symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global()} | _globals_of(inner)
    return found


def _places(statement: ast.AST) -> Iterator[ast.AST]:
    """Yield what the statement itself writes to, or calls a method of: ``Net.scale = 2``, ``TABLE[1] = Net``,
    ``names.append("x")``.
    """
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(statement, (ast.Attribute, ast.Subscript)) and isinstance(statement.ctx, ast.Store):
        yield statement
    if isinstance(statement, ast.Call) and isinstance(statement.func, ast.Attribute):
        yield statement.func
    for child in ast.iter_child_nodes(statement):
        yield from _places(child)


class _Main(ModuleType):
    """Plays ``__main__``: the classes of scripts, and for all else the program that runs."""

    def __init__(self) -> None:
        super().__init__(MAIN)
        self.scripts: dict[Path, Script] = {}

    def __getattr__(self, name: str) -> Any:
        for script in self.scripts.values():
            if name in script.names:
                return script.get(name)
        return getattr(_PROGRAM, name)


_PROGRAM = sys.modules[MAIN]
_MAIN = _Main()


def script(path: Path) -> Script:
    """Return the script at ``path``, which ``playing_main`` knows from now on; anew where the file has changed."""
    known = _MAIN.scripts.get(path)
    if known is None or known.text != path.read_bytes():
        known = _MAIN.scripts[path] = Script(path)
    return known


def knows_a_script() -> bool:
    """Whether a script gave a class."""
    return any(each.done for each in _MAIN.scripts.values())


@contextmanager
def playing_main() -> Iterator[None]:
    """Let pickles find in ``__main__`` what the scripts define that the user named."""
    before = sys.modules[MAIN]
    sys.modules[MAIN] = _MAIN
    try:
        yield
    finally:
        sys.modules[MAIN] = before
