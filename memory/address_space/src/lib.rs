//! lodger-address-space
