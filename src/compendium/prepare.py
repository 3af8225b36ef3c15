"""What a study trains on and is tested on: its prepared.npz, of images or of texts."""

from compendium import images, paths, settings, texts
from compendium.settings import Data

OF_IMAGES = ("mean", "std", "test_mean", "test_std", "per_class", "shifted")  # settings that texts do not have


def prepare(config: Data) -> dict:
    """The arrays of a study's prepared.npz, of images or texts; ValueError for an unknown data set, and for settings of
    the other kind."""
    if config.dataset in texts.DATASETS:
        if given := [name for name in OF_IMAGES if getattr(config, name)]:
            raise ValueError(f"'{given[0]}' is a setting of images, and this study's data are texts.")
        return texts.prepare(config)
    if config.dataset in images.DATASETS:
        if config.vectors or config.masked:
            raise ValueError("'vectors' and 'masked' are settings of texts, and this study's data are images.")
        return images.prepare(config)
    known = (*images.DATASETS, *texts.DATASETS)
    raise ValueError(f"Unknown data set '{config.dataset}'; choose one of: {', '.join(known)}.")


def write_prepared(study: str) -> None:
    """Write a study's prepared.npz without the pipeline."""
    paths.write_npz(paths.prepared(study), **prepare(settings.data(study)))
    print(f"Wrote {paths.prepared(study)}.")
