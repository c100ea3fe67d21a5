//! lodger-chipset
