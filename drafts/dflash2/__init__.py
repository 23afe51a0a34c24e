"""DFlash2: a block draft with convolutions along the block and a selector among each slot's candidates."""
