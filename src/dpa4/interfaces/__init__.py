"""Engines that run a potential: ASE, TorchSim, LAMMPS (`fix external` and ML-IAP), with dispersion on top."""
