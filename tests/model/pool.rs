//! The library's parts, and a pool made of them.

#[path = "../../src/pool/budget.rs"]
pub(crate) mod budget;
#[path = "../../src/pool/gate/mod.rs"]
pub(crate) mod gate;
#[path = "../../src/pool/ledger.rs"]
pub(crate) mod ledger;
#[path = "../../src/pool/order.rs"]
pub(crate) mod order;
#[path = "../../src/pool/waits.rs"]
pub(crate) mod waits;

#[path = "leak.rs"]
mod leak;
#[path = "manager.rs"]
pub(crate) mod manager;
#[path = "sync.rs"]
pub(crate) mod sync;
#[path = "whole.rs"]
pub(crate) mod whole;
#[path = "world.rs"]
pub(crate) mod world;
