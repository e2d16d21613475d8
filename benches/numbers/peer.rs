//! Diesel with r2d2, as a program without this crate has it.

use diesel::r2d2::ConnectionManager;

use crate::table::Conn;

pub type Pool<C> = r2d2::Pool<ConnectionManager<C>>;

/// With the ping at every checkout that is r2d2's default, or without.
pub fn pool<C: Conn>(url: &str, size: u32, ping: bool) -> Pool<C> {
    r2d2::Pool::builder()
        .max_size(size)
        .min_idle(Some(0))
        .test_on_check_out(ping)
        .build(ConnectionManager::new(url))
        .unwrap()
}
