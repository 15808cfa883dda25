//! What a snapshot keeps of a device and its transport. It comes back from a file that may be
//! corrupt, so nothing of it is believed.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::{MmioTransport, TransportError, status};
use crate::virtio::queue::Virtqueue;

/// The state of a paused device, to be stored as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    device_type: u32,
    status: u32,
    needs_reset: bool,
    interrupt_status: u32,
    config_generation: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<SavedQueue>,
    device: serde_json::Value,
}

/// `virtio_queue::QueueState`, which serde does not know.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl From<SavedQueue> for QueueState {
    fn from(saved: SavedQueue) -> Self {
        Self {
            max_size: saved.max_size,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_idx,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        }
    }
}

impl MmioTransport {
    /// Pauses the device, if it is not paused, and gives its state.
    pub fn save(&mut self) -> TransportState {
        self.pause();
        TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            needs_reset: self.interrupt.is_broken(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            queues: self.queues.iter().map(|q| q.state().into()).collect(),
            device: self.device.save(),
        }
    }

    /// Takes over a state that another transport of the same kind of device gave. The device is
    /// paused after it. An interrupt that was pending is raised again.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), TransportError> {
        let device_type = self.device.device_type();
        let refuse = |problem| Err(TransportError::State { device_type, problem });
        self.pause();
        if state.device_type != device_type {
            return refuse("it is another kind of device's");
        }
        if state.status & !status::BY_DRIVER != 0 {
            return refuse("no driver sets such a status");
        }
        let negotiated = state.status & status::FEATURES_OK != 0;
        if state.status & status::DRIVER_OK != 0 && !negotiated {
            return refuse("the driver is ready, and no features are agreed on");
        }
        if negotiated && !self.features_acceptable(state.driver_features) {
            return refuse("the driver uses features that the device does not have");
        }
        let max_sizes = self.device.queue_max_sizes();
        let same_queues = state.queues.len() == max_sizes.len()
            && (state.queues.iter().zip(max_sizes)).all(|(saved, max)| saved.max_size == *max);
        if !same_queues {
            return refuse("its queues are not those of the device");
        }
        let mut queues = Vec::with_capacity(self.queue_count);
        for saved in &state.queues {
            let Ok(queue) = Queue::try_from(QueueState::from(*saved)) else {
                return refuse("a queue has an unusable size or address");
            };
            queues.push(Virtqueue::new(queue));
        }
        self.queues = queues;
        if state.status & status::DRIVER_OK != 0 && !self.queues_valid() {
            return refuse("a queue is not in memory");
        }
        self.device.restore(&state.device).map_err(|source| TransportError::Device { device_type, source })?;
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.interrupt.restore(state.interrupt_status, state.config_generation, state.needs_reset);
        Ok(())
    }
}
