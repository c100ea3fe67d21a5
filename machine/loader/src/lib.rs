//! lodger-loader
