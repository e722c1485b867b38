"""How alike layers are: NPIB, CKA, redundancy, with intervals and plots."""
