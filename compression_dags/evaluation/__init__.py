"""Measuring a checkpoint: perplexity of a text, lm-eval's tasks, and guards on the dense model's score."""

from compression_dags.evaluation.known import check_dense
from compression_dags.evaluation.tasks import HarnessTask, PerplexityTask, Task, TaskBook, data_digest, load_tasks

__all__ = ["HarnessTask", "PerplexityTask", "Task", "TaskBook", "check_dense", "data_digest", "load_tasks"]
