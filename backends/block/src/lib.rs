//! lodger-block
