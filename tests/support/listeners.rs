use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A peer that the kernel shakes hands for and that never sends a byte.
pub fn silent_listener() -> (SocketAddr, SilentListener) {
    let (address, listener) = listen();
    (address, SilentListener { _listener: listener })
}

/// A peer whose queue is full: further connection attempts hang without an answer.
pub fn full_backlog_listener() -> (SocketAddr, FullListener) {
    let (address, listener) = listen();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(50)) {
        queued.push(stream);
        assert!(queued.len() < 900, "this kernel does not honour the backlog of a listener");
    }
    (address, FullListener { _listener: listener, _queued: queued })
}

pub struct SilentListener {
    _listener: TcpListener,
}

pub struct FullListener {
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

fn listen() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback listener");
    (listener.local_addr().expect("a bound listener has an address"), listener)
}
