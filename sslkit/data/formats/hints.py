"""What to do with files that are no images by their names: said in a sentence that holds when it is followed."""

from collections import Counter
from collections.abc import Mapping

ADVICE = {
    (".npy", ".npz", ".pt", ".pth", ".mat"): "these are arrays: save each as an image, by "
    "PIL.Image.fromarray(array.astype('uint8')).save('x.png'), or, of other channels or 16 bits, by "
    "tifffile.imwrite('x.tif', array)",
    (".h5", ".hdf5", ".zarr", ".tfrecord", ".tfrecords", ".mdb", ".lmdb", ".rec", ".pkl", ".beton"): "images inside "
    "such files are not read: write them as image files, tar or parquet",
    (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst"): "unpack the archives first",
    (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg"): "these are videos: write their frames as images, by "
    "ffmpeg -i x.mp4 frames/%06d.jpg",
    (".dcm", ".dicom", ".nii", ".nrrd", ".mha", ".svs", ".ndpi", ".czi"): "convert them to PNG or TIFF",
    (".heic", ".heif", ".jxl", ".cr2", ".nef", ".arw", ".dng", ".psd", ".svg", ".pdf"): "convert them to JPEG or PNG",
    (".csv", ".json", ".jsonl", ".txt", ".xml", ".yaml", ".yml", ".md"): "give the folder that holds the images "
    "themselves",
}
MAGIC: Mapping[bytes, str] = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"P5": ".pgm",
    b"P6": ".ppm",
}


def image_suffix(start: bytes) -> str:
    """The usual suffix of an image that begins with these bytes; empty for what is none."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return ".webp"
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), "")


def count_suffixes(left_out: Counter[str]) -> str:
    """The suffixes of files that are left out, the most frequent first."""
    listed = [f"{suffix} {count}" for suffix, count in left_out.most_common(6)]
    return ", ".join(listed) + (" and others" if len(left_out) > 6 else "")


def advice_for(left_out: Counter[str]) -> str:
    """What to do with files of these suffixes; empty where nothing is known."""
    for suffix, _ in left_out.most_common():
        for suffixes, words in ADVICE.items():
            if suffix in suffixes:
                return f"{suffix}: {words}"
    return ""


def no_images(left_out: Counter[str], example: str) -> str:
    """The rest of the sentence about a folder without images: what its files are, and what to do.

    Args:
        left_out: How many files there are of each suffix.
        example: Path of the first.
    """
    try:
        with open(example, "rb") as stream:
            found = image_suffix(stream.read(16))
    except OSError:
        found = ""
    there = f"holds no images by their names: {count_suffixes(left_out)}"
    if found:
        suffix = next(iter(left_out.most_common(1)))[0]
        old = "*" if suffix == "no suffix" else f"*{suffix}"
        new = '"$f"' if suffix == "no suffix" else f'"${{f%{suffix}}}"'
        return (
            f"{there}; the first looks like {found}, and files are taken for images by their suffix: rename them, such "
            f'as by: for f in {old}; do mv "$f" {new}{found}; done'
        )
    return f"{there}; {advice_for(left_out) or 'give the folder that holds the images themselves'}"
