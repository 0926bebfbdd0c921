//! Requests to write, as they pass from the test to a program under test.

/// One request.
pub(crate) enum Request {
    /// Bytes at an offset, both a multiple of 512.
    Write(u64, Vec<u8>),
    /// A range that shall read as zeros, freed if that can be.
    Zeros(u64, u64),
}

/// The requests as bytes: kind, offset and length as big-endian words, and what to write.
pub(crate) fn encode(requests: &[Request]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for request in requests {
        let (kind, at, length, data): (u64, _, _, &[u8]) = match request {
            Request::Write(at, data) => (1, *at, data.len() as u64, data),
            Request::Zeros(at, length) => (0, *at, *length, &[]),
        };
        bytes.extend([kind, at, length].into_iter().flat_map(u64::to_be_bytes));
        bytes.extend_from_slice(data);
    }
    bytes
}

/// The requests that [`encode`] wrote.
pub(crate) fn decode(mut bytes: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some((words, rest)) = bytes.split_at_checked(24) {
        let word = |n: usize| u64::from_be_bytes(words[8 * n..8 * n + 8].try_into().unwrap());
        let (at, length) = (word(1), word(2));
        bytes = rest;
        requests.push(match word(0) {
            0 => Request::Zeros(at, length),
            _ => {
                let (data, rest) = bytes.split_at(length as usize);
                bytes = rest;
                Request::Write(at, data.to_vec())
            }
        });
    }
    requests
}
