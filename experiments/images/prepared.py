"""Sets that tensorflow-datasets has prepared as array_record; TensorFlow is not imported."""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from experiments.common.errors import UserError
from experiments.common.files import check_ordinary, read_json
from experiments.images.dataset import Dataset, Images, Labels, check_labels, moments, some
from experiments.images.streamed import StreamedImages

OWN_FEATURE = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+", re.ASCII)


def load(
    name: str,
    data_dir: str | None,
    *,
    image_size: int | None,
    image_memory: float,
    random_crops: bool = False,
) -> Dataset:
    """Reads "tfds:NAME[/CONFIG][:VERSION]".

    A split whose images take more than `image_memory` bytes is not kept in memory: they are read
    and decoded whenever they are asked for, and the channels' means are those of 2,048 of them.
    With `random_crops` that is so of the training images, which then are as they were prepared.

    Raises:
        UserError: there is no such set, it is of another kind or format, or it cannot be read.
    """
    folder = _find(name, data_dir)
    _check_features(folder)
    tfds = import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        splits = builder.info.splits
        image_key, label_key = _keys(name, builder.info, tfds)
        test = next((split for split in ("test", "validation") if split in splits), None)
        if "train" not in splits or test is None:
            raise UserError(
                f"{name} needs the splits train and test (or validation), it has {list(splits)}"
            )
        found: list[tuple[Images | StreamedImages, Labels]] = []
        for split in ("train", test):
            images: Images | StreamedImages = _images(
                name, builder.as_data_source(split), image_key, image_size
            )
            kept = not (random_crops and split == "train")
            if kept and math.prod(images.shape) <= image_memory:
                images = cast(Images, images[np.arange(len(images))])
            undecoded = {image_key: tfds.decode.SkipDecoding()}
            source = builder.as_data_source(split, decoders=undecoded)
            labels = np.asarray([example[label_key] for example in source], np.int32)
            found.append((images, labels))
        (train_images, train_labels), (test_images, test_labels) = found
        mean, std = moments(some(train_images))
    except UserError:
        raise
    except NotImplementedError:
        raise UserError(
            f"{folder} is not in the format array_record; prepare it again in another folder: "
            f"{_command(name, 'DIR')}"
        ) from None
    except Exception as error:  # whatever array_record and protobuf raise on damaged files
        raise UserError(f"{folder} cannot be read ({type(error).__name__}: {error})") from None
    classes = builder.info.features[label_key].num_classes
    check_labels(train_labels, classes, folder)
    check_labels(test_labels, classes, folder)
    return Dataset(
        name, train_images, train_labels, test_images, test_labels, classes, mean, std,
        crop_padding=train_images.shape[1] // 8,
        # Mirrored characters are other characters.
        flip=not any(word in name for word in ("mnist", "kmnist", "svhn", "cmaterdb", "digit")),
        note=f"test images: the split {test!r}",
        class_names=tuple(builder.info.features[label_key].names),
    )  # fmt: skip


def import_tfds() -> Any:
    """tensorflow-datasets as it is installed; not what has its name where the command is run.

    Raises:
        UserError: it, or array_record, is not there.
    """
    before, here = list(sys.path), os.getcwd()
    sys.path[:] = [path for path in before if path and os.path.abspath(path) != here]
    try:
        import array_record  # noqa: F401 - has no package for Windows
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"--dataset tfds:NAME needs tensorflow-datasets and array-record, which here are not "
            f"to be had: {error}"
        ) from None
    finally:
        sys.path[:] = before
    return tfds


def _check_features(folder: Path) -> None:
    """Refuses a set with types of features that tensorflow-datasets does not have itself.

    It would import the module that features.json names, from wherever Python finds one.

    Raises:
        UserError: see above, or a file is damaged.
    """
    check_ordinary(folder)
    read_json(folder / "dataset_info.json")
    path = folder / "features.json"
    # Both forms that the library reads: since 4.5 the second.
    for name in _values(read_json(path), ("type", "pythonClassName", "python_class_name")):
        if not OWN_FEATURE.fullmatch(name):
            raise UserError(
                f"{path} has a feature of the type {name!r:.200}, which is none of "
                "tensorflow-datasets' own"
            )


def _values(value: Any, keys: Sequence[str]) -> Iterator[str]:
    """The strings that have one of these keys, at any depth of a JSON value."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from (value[key] for key in keys if isinstance(value.get(key), str))
            left += value.values()
        elif isinstance(value, list):
            left += value


def _command(name: str, folder: str) -> str:
    return f"tfds build {name.removeprefix('tfds:')} --file_format=array_record --data_dir={folder}"


def _find(name: str, data_dir: str | None) -> Path:
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    path, _, version = name.removeprefix("tfds:").partition(":")
    odd = version and not re.fullmatch(r"[\w.]+", version)
    if not path or ".." in Path(path).parts or odd:
        raise UserError(f"--dataset: {name!r} names no data set")
    found = [p.parent for p in (root / path).glob(f"{version or '*'}/dataset_info.json")]
    if not found:
        raise UserError(
            f"{root / path} holds no data set that tensorflow-datasets has prepared; once, where "
            f"TensorFlow is installed, run: {_command(name, str(root))}"
        )
    return max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])


def _keys(name: str, info: Any, tfds: Any) -> tuple[str, str]:
    features = info.features
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    image, label = info.supervised_keys if info.supervised_keys else (images[:1], labels[:1])
    image, label = (key[0] if isinstance(key, list) and key else key for key in (image, label))
    if image not in images or label not in labels:
        raise UserError(
            f"{name} is no image classification set: it has the features "
            f"{', '.join(f'{k} ({type(v).__name__})' for k, v in features.items())}"
        )
    return image, label


def _images(name: str, source: Any, key: str, size: int | None) -> StreamedImages:
    """The images of a split, resized where a size is given; otherwise all must be of one."""
    if not len(source):
        raise UserError(f"{name} has no images in a split")
    first = source[0][key]
    shape = first.shape if size is None else (size, size, first.shape[-1])

    def read(indices: Sequence[int]) -> list[Images]:
        images = []
        for example in source.__getitems__(list(indices)):
            image = example[key]
            if image.dtype != np.uint8:
                raise UserError(f"{name} has images of {image.dtype}, expected uint8")
            images.append(image)
            if size is None and image.shape != shape:
                raise UserError(
                    f"{name} has images of several sizes, {shape} and {image.shape}: "
                    "give --image-size"
                )
        return images

    return StreamedImages(read, range(len(source)), shape, resize=size is not None)
