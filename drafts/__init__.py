"""The draft methods, the protocol they implement, and what they share.

`METHODS` is the one list of methods: a new one is a folder beside `dflash/` and an entry here. Importing this package
imports no torch.
"""

from __future__ import annotations

from drafts.dflash.config import DFlashMethod
from drafts.dflash2.config import DFlash2Method
from drafts.dspark.config import DSparkMethod
from drafts.eagle3.config import Eagle3Method
from drafts.lilicorr.config import LiLiCorrMethod
from drafts.method import DraftMethod
from drafts.peagle.config import PEagleMethod

METHODS: dict[str, DraftMethod] = {
    method.name: method
    for method in (
        DFlashMethod(),
        DFlash2Method(),
        DSparkMethod(),
        Eagle3Method(),
        LiLiCorrMethod(),
        PEagleMethod(),
    )
}
