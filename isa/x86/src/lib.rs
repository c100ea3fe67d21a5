//! lodger-x86
