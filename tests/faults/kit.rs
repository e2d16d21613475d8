//! The test kit by whole processes: many at once, and those that end as they should not. Each test has a server and a
//! shared folder of its own; the processes are this program again.

mod child;
mod cut_connections;
mod files;
mod kept_databases;
mod killed_processes;
mod many_tests;
mod process_ends;
mod production;
mod server;
