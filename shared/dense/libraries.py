"""mmdet and mmseg as zoos of models: their own config files by name, with a dictionary of differences.

    library = detection()
    config = library.config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", {"model.backbone.init_cfg": None})
    model = library.build(config.model)

Imports are late, because those of both libraries take seconds of processor time. What mmengine 0.10.7 needs
with current PyTorch and setuptools:

- Its ``get_config`` and ``Config.fromfile("mmdet::...")`` look packages up with pkg_resources, which setuptools no
  longer has. ``Library.config`` reads the file in the package itself.
- Parts find each other through one default scope for the whole process, which ``register_all_modules`` sets and
  nothing unsets. Here it is set while something is built, and then put back, so that the order of builds does not
  matter where both libraries are in one process.
- Its checkpoints hold objects that ``torch.load`` refuses since weights_only=True is its default, so that its Runner
  cannot resume them. Our loop and our checkpoints take its place.
- SyncBN, which mmseg's configs ask for, refuses to train on the CPU: ``shared.training.ranks.with_global_batchnorm``
  converts it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.errors import UserError

# What requirements-dense.lock installs, by the names that one imports.
MODULES = (
    "addict",
    "cv2",
    "ftfy",
    "mmcv",
    "mmdet",
    "mmengine",
    "mmseg",
    "prettytable",
    "pycocotools",
    "regex",
    "shapely",
    "six",
    "termcolor",
    "terminaltables",
    "wcwidth",
    "yapf",
)


def missing_modules() -> list[str]:
    """Return the modules of the extra that are not installed; nothing is imported."""
    return [name for name in MODULES if find_spec(name) is None]


def require_dense() -> None:
    """Raise UserError where the libraries of detection and segmentation are not installed."""
    if missing := missing_modules():
        raise UserError(
            f"detection and segmentation need libraries that are not installed ({', '.join(missing)}): "
            "run `make setup-dense`"
        )


@dataclass(frozen=True)
class Library:
    """One of the two, imported: ``name`` is its package and its scope, ``registry`` its module of registries."""

    name: str
    registry: ModuleType

    def config(self, name: str, differences: dict[str, Any] | None = None):
        """Return mmengine's Config of the file ``<package>::<path below its configs>``, changed by ``differences``.

        Keys may be dotted (``model.roi_head.bbox_head.num_classes``); a dictionary is merged into what is there unless
        it holds ``_delete_=True``. Raises UserError for a file that the library does not have.
        """
        from mmengine.config import Config

        package, separator, path = name.partition("::")
        configs = Path(find_spec(self.name).origin).parent / ".mim" / "configs"
        file = configs / path
        if not separator or package != self.name or not path or not file.is_file():
            raise UserError(f"{name!r} is no config file of {self.name}: give {self.name}::<a path below {configs}>")
        config = Config.fromfile(file)
        # One by one: together, a dictionary under "model" would silently replace what a key "model.x" said before it.
        for key, value in (differences or {}).items():
            config.merge_from_dict({key: value})
        return config

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Let mmengine's registries find this library's parts by their bare names, until the block ends."""
        from mmengine.registry import DefaultScope

        with DefaultScope.overwrite_default_scope(self.name):
            yield

    def build(self, part: dict[str, Any], kind: str = "MODELS"):
        """Return what ``part`` describes, from the registry ``kind``: MODELS, TRANSFORMS, DATASETS, METRICS, ...

        Weights are random: ``init_weights()`` of a model loads those that its ``init_cfg`` names.
        """
        with self.scope():
            return getattr(self.registry, kind).build(part)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what pycocotools prints while it reads and counts from standard output, until the block ends."""
    with redirect_stdout(StringIO()):
        yield


def _prepare() -> None:
    """Make mmengine and ``mmcv.ops`` ready to be imported by either library."""
    require_dense()
    from shared.dense.extension import provide_operations  # with PyTorch, which the ledger's commands do without

    provide_operations()
    from mmengine.logging import MMLogger

    # At its own level, INFO, it writes three lines for every tensor that init_weights() sets to standard output.
    if not MMLogger.check_instance_created("mmengine"):
        MMLogger.get_instance("mmengine", log_level="WARNING")


def detection() -> Library:
    """Return mmdet with all its parts registered. Raises UserError where it is not installed."""
    _prepare()
    import mmdet.registry
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    return Library("mmdet", mmdet.registry)


def segmentation() -> Library:
    """Return mmseg with all its parts registered. Raises UserError where it is not installed."""
    _prepare()
    import mmseg.registry
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    return Library("mmseg", mmseg.registry)
