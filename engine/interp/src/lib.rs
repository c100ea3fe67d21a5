//! lodger-interp
