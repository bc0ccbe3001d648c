"""A folder of pictures as a TFDS dataset of equal squares: what `prepare` writes."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from flax_alexnet.data.ahead import map_threads
from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.sources import PREPARED_FOLDER, Dataset, Source
from flax_alexnet.errors import UserError


class PreparedFolder(tfds.core.GeneratorBasedBuilder):
    """Pictures of a folder brought to `size` × `size` by the paper's rule, as JPEG.

    The dataset's name is "prepared_folder/NAME", where NAME is the folder's.
    """

    name = PREPARED_FOLDER
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, dataset: Dataset, name: str, data_dir: Path, size: int, quality: int = 90):
        self._dataset, self._size, self._quality = dataset, size, quality
        config = tfds.core.BuilderConfig(name=name, version=self.VERSION)
        super().__init__(config=config, data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self._size, self._size, 3)
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(self._dataset.label_names)),
                    "name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {
            "train": self._generate_examples(self._dataset.train),
            "test": self._generate_examples(self._dataset.eval),
        }

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        def example(index: int) -> dict[str, Any]:
            (record,) = source.records([index])
            try:
                pixels = decode(record.image, self._size)
            except DecodeError as error:
                raise UserError(
                    f"cannot decode picture {record.name}: {error}; remove or repair it"
                ) from None
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "jpeg", quality=self._quality)
            encoded.seek(0)
            return {"image": encoded, "label": record.label, "name": record.name}

        yield from enumerate(map_threads(example, range(len(source))))
