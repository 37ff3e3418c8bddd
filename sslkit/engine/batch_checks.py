"""Whether a recipe's global batch fits the data, the processes, the BatchNorm groups and the slices."""

from sslkit.data.sources.image_source import ImageSource
from sslkit.errors import UserError
from sslkit.methods import Method
from sslkit.parts.batch_slices import local_bn_groups
from sslkit.recipe.resolve import Recipe


def steps_per_epoch(recipe: Recipe, source: ImageSource) -> int:
    """Whole batches in an epoch; the images left over are dropped, other ones in each epoch.

    Raises:
        UserError: The data has not enough images for one batch.
    """
    if recipe.train.batch_size > len(source):
        raise UserError(
            f"[train] batch_size: {recipe.train.batch_size} is more than the {len(source)} images of "
            f"{source.description}; set it to {len(source)} or less"
        )
    return len(source) // recipe.train.batch_size


def check_batch_split(recipe: Recipe, method: Method, processes: int) -> None:
    """Check that the global batch splits into equal parts for processes, for each module's BN groups and for slices.

    Raises:
        UserError: It does not.
    """
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch
    if micro and batch % (processes * micro):
        raise UserError(
            f"[train] micro_batch: {micro} does not divide the {batch / processes:g} images of each process's part of "
            f"[train] batch_size = {batch}; take a divisor"
        )
    for groups in dict.fromkeys(method.batch_norm_groups().values()):
        across = method.groups_across_processes
        if (processes < groups and groups % processes) or (across and groups < processes and processes % groups):
            raise UserError(f"[method] bn_groups: {groups} groups cannot be shared by {processes} processes")
        parts = processes * local_bn_groups(groups)
        if batch % parts or batch // parts < 2:
            raise UserError(
                f"[train] batch_size: {batch} does not split into {parts} equal parts of two or more images "
                f"({processes} processes, [method] bn_groups = {groups})"
            )
