//! The `lodger` executable from end to end, as users and scripts see it.

mod agent;
mod boot;
mod cli;
mod disk;
mod durability;
mod guest;
mod import;
mod memory;
mod network;
mod process;
mod pull;
mod registry;
mod share;
mod vms;
