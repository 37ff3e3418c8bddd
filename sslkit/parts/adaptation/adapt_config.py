"""The ``[adapt]`` table of a recipe."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AdaptConfig(BaseModel):
    """``[adapt]``: how a pretrained backbone is continued. By default all of it is trained, freely.

    Attributes:
        last_blocks: Train only this many last blocks and what follows them (0: all). Blocks are timm's.
        lora_rank: Train only low-rank updates of this rank of the attention and MLP projections (LoRA,
            arXiv:2106.09685), through ``peft``. ``encoder/`` has them merged. 0: none.
        freeze_batch_norm: Normalise by the running statistics of the start, in student and teacher. Always so with
            ``last_blocks`` or ``lora_rank``. Scale and shift are trained all the same.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one before it. 1: equal rates.
        anchor: Weight of a term that keeps the student's features near those of the start: 1 - cosine similarity.
        anchor_size: Size in pixels at which the start sees the views for that term (0: that of the views). A larger
            one teaches the student the features of larger images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    last_blocks: int = Field(strict=True, default=0, ge=0, le=1000)
    lora_rank: int = Field(strict=True, default=0, ge=0, le=4096)
    freeze_batch_norm: bool = False
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    anchor: float = Field(default=0.0, ge=0.0)
    anchor_size: int = Field(strict=True, default=0, ge=0, le=4096)

    @model_validator(mode="after")
    def _fit_together(self) -> "AdaptConfig":
        if self.last_blocks and self.lora_rank:
            raise ValueError("last_blocks and lora_rank are two ways to train less; set one of them to 0")
        if self.anchor_size and not self.anchor:
            raise ValueError("anchor_size needs the anchor; set anchor, such as 1.0")
        return self

    @property
    def keeps_statistics(self) -> bool:
        """Whether BatchNorm normalises by the running statistics of the start."""
        return self.freeze_batch_norm or bool(self.last_blocks or self.lora_rank)

    @property
    def changes_nothing(self) -> bool:
        """Whether the backbone is trained as without the table."""
        return self == AdaptConfig()
