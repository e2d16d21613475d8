//! The core of the library's pool, and the model around it.

#[path = "../../src/pool/admission.rs"]
pub(crate) mod admission;
#[path = "../../src/pool/connection_limit.rs"]
pub(crate) mod connection_limit;
#[path = "../../src/pool/growth.rs"]
pub(crate) mod growth;
#[path = "../../src/pool/storage.rs"]
pub(crate) mod storage;
#[path = "../../src/pool/wait_graph.rs"]
pub(crate) mod wait_graph;
#[path = "../../src/pool/waiter.rs"]
pub(crate) mod waiter;

#[path = "imitation.rs"]
pub(crate) mod imitation;
#[path = "world.rs"]
pub(crate) mod world;
