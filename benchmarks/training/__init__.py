"""How the built-in model and its judge are made: drawings from npm packages, augmentation, and two training scripts.

- `npm pack` the packages that qandc_core/demo/ATTRIBUTION.md lists into a folder DIR.
- `python -m benchmarks.training.prepare DIR` writes their drawings of forty things, drawings.safetensors.
- `python -m benchmarks.training.train DRAWINGS RUN` trains the DiT; the same command resumes it.
- `python -m benchmarks.training.judge DRAWINGS JUDGE FOLDS` trains the judge.
- `python -m benchmarks.training.evaluate OUT --drawings DRAWINGS --folds FOLDS/*` says how good the shipped model is.
"""
