"""Advice about files whose names are not those of images."""

from collections import Counter
from collections.abc import Mapping

from sslkit.errors import UserError

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
    """The usual suffix of an image file that begins with these bytes; empty if it is no image."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return ".webp"
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), "")


def count_suffixes(skipped: Counter[str]) -> str:
    """Suffixes and their counts, the most frequent first, for messages."""
    listed = [f"{suffix} {count}" for suffix, count in skipped.most_common(6)]
    return ", ".join(listed) + (" and others" if len(skipped) > 6 else "")


def advice_for(skipped: Counter[str]) -> str:
    """What to do with files of these suffixes; empty if there is no advice."""
    for suffix, _ in skipped.most_common():
        for suffixes, advice in ADVICE.items():
            if suffix in suffixes:
                return f"{suffix}: {advice}"
    return ""


def no_images(folder: str, skipped: Counter[str], example: str) -> UserError:
    """The error about a folder without images, from the number of files of each suffix and the path of the first."""
    if not skipped:
        return UserError(f"[data] path: the folder {folder!r} is empty; give a folder of images")
    try:
        with open(example, "rb") as stream:
            found = image_suffix(stream.read(16))
    except OSError:
        found = ""
    advice = advice_for(skipped) or "give the folder that holds the images themselves"
    if found:
        suffix = skipped.most_common(1)[0][0].replace("no suffix", "")
        advice = (
            f"the first looks like {found}, but images are recognised by their suffix: rename them, for example by: "
            f'for f in *{suffix}; do mv "$f" "${{f%{suffix}}}"{found}; done'
        )
    files = f"judging by file names: {count_suffixes(skipped)}"
    return UserError(f"[data] path: {folder!r} holds no images, {files}; {advice}")
