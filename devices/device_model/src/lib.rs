//! lodger-device-model
