//! lodger-char
