//! The server as a guest's kernel sees it, and as one that means harm does.

mod client;
mod hostile;
mod limits;
mod operations;
mod race;
