"""Turns deprecation warnings from our own modules into errors in scripts that tests start.

Python imports this file by itself when its folder is on PYTHONPATH. PYTHONWARNINGS cannot do it:
there a module's name must match as a whole, so it would name every module.
"""

import warnings

OURS = r"(models|utils|experiments|train|train_distill|test|detect|export|hubconf|__main__)(\.|$)"

for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module=OURS)
