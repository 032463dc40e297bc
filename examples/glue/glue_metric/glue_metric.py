"""The GLUE metrics as an `evaluate` module that needs no network: those of cmp_trainer, by task.

Loaded by its folder, with the task as configuration name:

    evaluate.load("examples/glue/glue_metric", "mrpc").compute(predictions=[1, 0], references=[1, 1])
"""

# `evaluate` reads this file's imports line by line to see what must be installed.
import datasets
import evaluate
import numpy as np

from cmp_trainer.data.classification import METRICS

CITATION = """\
@inproceedings{wang2019glue,
  title = {{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author = {Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}
"""

METRICS_OF_TASK = {
    "cola": ["matthews_correlation"],
    "sst2": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
    "qqp": ["accuracy", "f1"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
}


class GlueMetric(evaluate.Metric):
    """The metrics of the GLUE task named by `config_name`, each a fraction (not a percentage)."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS_OF_TASK:
            raise ValueError(f"unknown GLUE task {self.config_name!r}; expected one of {', '.join(METRICS_OF_TASK)}")
        kind = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=f"GLUE {self.config_name}: {', '.join(METRICS_OF_TASK[self.config_name])}",
            citation=CITATION,
            inputs_description="predictions and references: class numbers, or scores where the task is stsb",
            features=datasets.Features({"predictions": kind, "references": kind}),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {
            name: METRICS[name](np.asarray(predictions), np.asarray(references))
            for name in METRICS_OF_TASK[self.config_name]
        }
