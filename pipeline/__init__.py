"""The stage graph from a model to a bundle: order, artifacts, configuration, tracking, report.

Importing this package, or any module of it outside `pipeline.stages` builders, stays cheap: a run that
reuses everything never loads torch.
"""
