"""The language-model library: what the stages are made of, a folder for each job.

Begin with lm/train/loop.py, then lm/train/step.py, then lm/model/transformer.py: the whole training
on one screen, one step, the model. docs/ARCHITECTURE.md is the map.
"""

from lm.base import start as start
