"""SimpleViT on ImageNet through tensorflow-datasets, adding and multiplying."""

import argparse
import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.allocation import restart_with_huge_pages
from experiments.images.prepared import import_tfds
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome
from experiments.studies.study import TrainingOptions, comparison, families, train, with_seeds
from experiments.training.config import FAMILIES, TrainConfig

ABOUT = """\
SimpleViT on ImageNet, adder and conv at equal budget, through tensorflow-datasets.

The set is read as array_record, batch by batch, without TensorFlow. It is prepared once, where
TensorFlow is installed and the archives of ImageNet lie in DIR/downloads/manual:

  tfds build imagenet2012 --file_format=array_record --data_dir=DIR

Images of 224 x 224, patches of 16, and the sizes of ViT-S/16 as SimpleViT has it (Beyer et al.,
2022): 384 features, 12 blocks of 6 heads, an MLP of 1536; batch 1024, AdamW, rate 1e-3, weight
decay 1e-4, 10,000 steps of warm-up (8 epochs), 90 epochs; random parts of an image, of 5 to 100 %
of its area, resized and mirrored. Labels are smoothed by 0.1, for which they have RandAugment and
mixup. --epochs 25 is the length of the second study's runs. --smoke trains a small network on a
small stand-in that it writes in the same format: JPEG files of several sizes.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(
        dataset="tfds:imagenet2012", image_size=224, model="vit", epochs=90, batch_size=1024,
        weight_decay=1e-4, warmup_epochs=8.0,
        random_crop=0.05, label_smoothing=0.1,
        model_options=("patch_size=16", "features=384", "depth=12", "num_heads=6",
                       "mlp_features=1536", "norm=batch"),
    ),
    smoke=TrainConfig(
        dataset="tfds:stand_in", image_size=16, model="vit", epochs=1, batch_size=16,
        image_memory=0.0, random_crop=0.25, label_smoothing=0.1,
        model_options=("patch_size=8", "features=16", "depth=1", "num_heads=2", "mlp_features=16",
                       "norm=batch"),
    ),
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--families",
        nargs="+",
        choices=FAMILIES,
        help="(default: adder conv; of the small size adder)",
    )
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    if options.smoke and options.dataset is None:
        write_stand_in(place.folder / "data")
        config = dataclasses.replace(config, data_dir=str(place.folder / "data"))
    names = options.families or (["adder"] if options.smoke else ["adder", "conv"])
    plans = with_seeds(families(config, names), TRAINING.chosen_seeds(options))
    runs = train(plans, place)
    title = f"SimpleViT on {config.dataset}: {config.epochs} epochs, batch {config.batch_size}"
    return comparison(title, runs, place)


def write_stand_in(folder: Path) -> None:
    """Prepares `stand_in`, 48 training and 16 validation images of two classes, as ImageNet's are.

    JPEG files of several sizes with smooth colours, brighter on the left or on the right.
    """
    tfds = import_tfds()
    tfds.disable_progress_bar()

    class StandIn(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, name-defined]
        VERSION = tfds.core.Version("1.0.0")
        url_infos: dict[str, Any] = {}  # noqa: RUF012 - otherwise looked for beside this module

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=2),
            })  # fmt: skip
            return tfds.core.DatasetInfo(
                builder=self, features=features, supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(48), "validation": self._generate_examples(16)}

        def _generate_examples(self, count: int = 0) -> Any:
            for i in range(count):
                yield i, {"image": _stand_in_jpeg(i), "label": i % 2}

    StandIn(data_dir=folder, file_format="array_record").download_and_prepare()


def _stand_in_jpeg(index: int) -> bytes:
    from PIL import Image

    rng = np.random.default_rng(index)
    height, width = rng.integers(24, 48, 2)
    ramp = np.linspace(1, -1, width) * (1 if index % 2 else -1)
    colour = rng.uniform(80, 170, 3)
    pixels = colour + 60 * ramp[:, None] + rng.normal(0, 5, (height, width, 3))
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, format="jpeg")
    return content.getvalue()


EXPERIMENT = Experiment("imagenet", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
