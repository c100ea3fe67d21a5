//! lodger-pci
