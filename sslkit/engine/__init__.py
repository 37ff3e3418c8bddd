"""Training. `trainer.train` is the entry; `setup`, `loop` and `step` are read in that order to follow a batch.

`state`, `optim` and `step` are used by the subpackages. These import only from those before them: `checkpoint`,
`resilience`, `run_folder`, `logging`, `monitor`.
"""

from sslkit.engine.run_folder.layout import Run
from sslkit.engine.trainer import train

__all__ = ["Run", "train"]
