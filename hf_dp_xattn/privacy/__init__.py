"""Privacy core: units and clipping, lattice, discrete noise, accountant, ledger. Knows no model."""
