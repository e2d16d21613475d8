//! What tests of programs on Diesel need.

#[cfg_attr(not(test), allow(dead_code))]
mod folder;
#[cfg_attr(not(test), allow(dead_code))]
mod line;
#[cfg_attr(not(test), allow(dead_code))]
mod lock_file;
#[cfg_attr(not(test), allow(dead_code))]
mod slots;
