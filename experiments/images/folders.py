"""One's own images, in a folder for each class: --dataset folder:DIR."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.common.errors import UserError
from experiments.images.dataset import Dataset, Images, Labels, moments, some
from experiments.images.files import ENDINGS, about_image, read_image
from experiments.images.streamed import StreamedImages

TESTS = ("test", "val", "validation")
TEST_SHARE = 1 / 5
PASSED_OVER = ("thumbs.db", "desktop.ini")
"""What Windows puts into folders; names that begin with a dot are passed over as well."""
MOST_NAMED = 3


class Split(NamedTuple):
    """The files of a split, and the number of each one's class."""

    paths: list[Path]
    labels: list[int]


def load(
    name: str,
    data_dir: str | None,
    *,
    image_size: int | None,
    image_memory: float,
    random_crops: bool,
    seed: int,
) -> Dataset:
    """Reads "folder:DIR".

    DIR has the folders train and test (or val, validation), each with a folder of image files for
    every class; or it has the folders of the classes itself, of which a fifth of the images, at
    least one of each class, chosen by the seed, are for the test. Images are grey where all of them
    are, and only coloured ones are mirrored in training: grey ones may be characters.

    Args:
        name: see above.
        data_dir: where DIR lies now, None for DIR itself.
        image_size: of the sides, to which images are resized; needed where they have several sizes.
        image_memory: bytes. A split that takes more is read and decoded batch by batch.
        random_crops: whether the training images are to be as they are, for random parts of them.
        seed: see above.

    Raises:
        UserError: the folder is none of such a kind, or files in it cannot be read.
    """
    root = Path(data_dir or name.removeprefix("folder:")).expanduser()
    if not name.removeprefix("folder:"):
        raise UserError(f"--dataset: {name!r} names no folder")
    classes, train, test, note = _splits(root, seed)
    sizes, colour = _about([*train.paths, *test.paths])
    if image_size is None and len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[:2]
        raise UserError(
            f"{root} has images of {len(sizes)} sizes, such as {height} x {width} and "
            f"{other_height} x {other_width}: give --image-size"
        )
    height, width = sizes.pop() if image_size is None else (image_size, image_size)
    shape = (height, width, 3 if colour else 1)
    train_images, test_images = (
        _images(split, shape, 0 if held_back else image_memory)
        for split, held_back in ((train, random_crops), (test, False))
    )
    mean, std = moments(some(train_images))
    return Dataset(
        name, train_images, _labels(train), test_images, _labels(test), len(classes), mean, std,
        crop_padding=min(shape[:2]) // 8, flip=colour, note=note, class_names=tuple(classes),
    )  # fmt: skip


# -- Folders ---------------------------------------------------------------------------------------


def _splits(root: Path, seed: int) -> tuple[list[str], Split, Split, str]:
    """The classes' names, both splits, and a note on where the test images are from."""
    if not root.exists():
        raise UserError(f"--dataset folder:{root} does not exist")
    if not root.is_dir():
        raise UserError(f"--dataset folder:{root} is a file, expected a folder of folders")
    folders = _folders(root)
    if "train" in folders and _folders(root / "train"):
        test = next((root / name for name in TESTS if name in folders), None)
        if test is None:
            raise UserError(f"{root} has a folder train, but no folder test beside it")
        return _two_folders(root / "train", test)
    if (found := next((name for name in TESTS if name in folders), None)) and (
        _folders(root / found)
    ):
        raise UserError(f"{root} has a folder {found}, but no folder train with classes beside it")
    return _one_folder(root, seed)


def _two_folders(train: Path, test: Path) -> tuple[list[str], Split, Split, str]:
    classes, of_test = _classes(train), _folders(test)
    if unknown := sorted(set(of_test) - set(classes)):
        raise UserError(f"{test / unknown[0]} is of a class that {train} does not have")
    if missing := sorted(set(classes) - set(of_test)):
        raise UserError(f"{test} has no folder {missing[0]}, a class of {train}")
    files = [_files(train / name) for name in classes]
    tested = [_files(test / name, may_be_empty=True) for name in classes]
    if not any(tested):
        raise UserError(f"{test} has no images")
    note = f"test images: the folder {test.name!r}"
    return classes, _mixed(files), _mixed(tested), note


def _one_folder(root: Path, seed: int) -> tuple[list[str], Split, Split, str]:
    classes = _classes(root)
    train, test = [], []
    for number, name in enumerate(classes):
        files = _files(root / name)
        if len(files) < 2:
            raise UserError(
                f"{root / name} has one image, expected two or more: some are for the test"
            )
        order = np.random.default_rng((seed, number)).permutation(len(files))
        count = max(1, round(len(files) * TEST_SHARE))
        test.append([files[place] for place in sorted(order[:count])])
        train.append([files[place] for place in sorted(order[count:])])
    note = f"a fifth of each class's images, chosen by the seed {seed}, are test images"
    return classes, _mixed(train), _mixed(test), note


def _mixed(files: Sequence[Sequence[Path]]) -> Split:
    """The classes mixed, so that the first and the last images are of all of them."""
    paths = [path for each in files for path in each]
    labels = [number for number, each in enumerate(files) for _ in each]
    order = np.random.default_rng(0).permutation(len(paths))
    return Split([paths[place] for place in order], [labels[place] for place in order])


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(folder: Path) -> list[str]:
    names = _folders(folder)
    if not names:
        loose = any(path.suffix.lower() in ENDINGS for path in folder.iterdir())
        what = "images, but no folder for each class" if loose else "no folders of images"
        raise UserError(f"{folder} has {what}: expected {folder}/CLASS/*.jpg, say")
    if len(names) == 1:
        raise UserError(f"{folder} has one class, {names[0]}, expected two or more")
    return names


def _files(folder: Path, *, may_be_empty: bool = False) -> list[Path]:
    """The image files of a class, in the order of their names."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in PASSED_OVER:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder in the folder of a class, expected image files")
        if path.suffix.lower() not in ENDINGS:
            known = " ".join(ENDINGS)
            raise UserError(f"{path} is no image file by its name, expected one of {known}")
        found.append(path)
    if not found and not may_be_empty:
        raise UserError(f"{folder} has no images")
    return found


# -- Images ----------------------------------------------------------------------------------------


def _about(paths: Sequence[Path]) -> tuple[set[tuple[int, int]], bool]:
    """The sizes that images have, and whether any has colour.

    Raises:
        UserError: some cannot be read; the first of them are named.
    """

    def look(path: Path) -> tuple[tuple[int, int], bool] | UserError:
        try:
            return about_image(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(look, paths))
    _raise([one for one in found if isinstance(one, UserError)], len(paths))
    seen = [one for one in found if not isinstance(one, UserError)]
    return {size for size, _ in seen}, any(colour for _, colour in seen)


def _raise(errors: Sequence[UserError], count: int) -> None:
    if errors:
        named = "; ".join(map(str, errors[:MOST_NAMED]))
        more = len(errors) - MOST_NAMED
        others = f"; and {more} more of {count} files" if more > 0 else ""
        raise UserError(named + others)


def _images(split: Split, shape: tuple[int, int, int], memory: float) -> Images | StreamedImages:
    """The images of a split, in memory if they take at most so many bytes."""

    def read(indices: Sequence[int]) -> list[Images]:
        return [read_image(split.paths[index], shape[2]) for index in indices]

    images = StreamedImages(read, range(len(split.paths)), shape, resize=True)
    if math.prod(images.shape) > memory:
        return images
    decoded: Images = images[np.arange(len(images))]
    return decoded


def _labels(split: Split) -> Labels:
    labels: NDArray[np.int32] = np.asarray(split.labels, np.int32)
    return labels
