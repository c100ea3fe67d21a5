//! lodger-board
